package english;

import org.apache.lucene.analysis.Analyzer;
import org.apache.lucene.analysis.en.EnglishAnalyzer;
import org.elasticsearch.plugin.NamedComponent;
import org.elasticsearch.plugin.analysis.AnalyzerFactory;

/** Brings the official server's analyzer "english" back to the distribution that lacks it. */
@NamedComponent("english")
public class EnglishAnalyzerFactory implements AnalyzerFactory {
    @Override
    public String name() {
        return "english";
    }

    @Override
    public Analyzer create() {
        return new EnglishAnalyzer();
    }
}
