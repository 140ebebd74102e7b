"""The papers' ablations in miniature: ``python -m benchmarks.ablations NAME|list|all``.

An ablation compares runs that differ in one thing, by numbers that its paper reports, and prints
the paper's finding beside the result, whether they agree or not. `registry` lists the ablations,
`prepare` makes what runs begin with, `runs` does the runs, `numbers` reads what they left, and
`report` makes table, verdicts and picture.

**The worlds.** There are two worlds of MiniWorld, and a search returns one passage. The policy is
trained in the first (seed 0) and evaluated on held-out questions of it, "in domain", and on
questions of the second (seed 1), "out of domain". They share no name. Each lacks five of the 26
relations, one of each kind of entity, and not the same ones: out of domain, five relations are
asked for that training never met. A world without some relations has shorter passages, which the
starter has not seen: that makes it hard.

How many relations are left out was chosen by trials with the shipped starter and one seed of GRPO,
192 episodes per step. How well the starter reads is its exact match when it is made to search for
every hop (greedy, at least 100 questions):

- All relations: it reads .81, and a policy gets there quickly, even on questions of three and four
  hops alone (T = 1: .42 after 12 steps, .89 after 20). Policies cannot be told apart.
- Half of the relations: it reads .21, and training stops where one search is enough (greedy,
  held out: .27, .25 and .26 after 10, 20 and 30 steps). Without questions of one hop it learned to
  guess in the right format (.02 searches after 16 steps).
- **One relation less of each kind:** it reads .53, and .40 on three and four hops. Training goes
  from .04 (T = 1, held out) to .14, .43, .66, .85 and .90 after 8, 16, 24, 32 and 40 steps, with
  setbacks, and greedy to .92 in domain and .91 out of it after 50. Without questions of one hop it
  learned to guess here, too (.04 searches after 8 steps).
- Two passages per search: it reads .06 with all relations, because it never saw two.

So runs have the third, and thirty steps. One ablation adds an engine that misses (`noise`). That of
answer rewards has a starter that adds needless words (`verbose_starter`): the shipped one never
says more than one word, so F1, EM and CEM train it to the same weights, bit for bit.

**The hard world.** The ablation of turns and trees has a world of its own: MiniWorld at difficulty
1, all relations, an engine that loses the best passage of a twentieth of all queries, and at most 8
searches. With the reward F1 and 30 steps of GRPO the shipped starter gets to .47, .25, .17 and less
than .01 at difficulties 1, 2, 3 and 4 without that noise (T = 1, 100 held-out questions, one seed).
With ReSearch's reward it learns to guess in the right format instead (difficulty 3: .00). A run is
evaluated in that world only; at the end without the noise ("em hard", and "em, 5+ hops" for its
chains of five and six facts, which are longer than any that the starter was shown). ``--tiny`` does
it in seconds; after ``--steps 60`` the first runs answered the chains of three and four facts.

**Numbers.** Exact match, tokens, searches and answers come from a greedy evaluation after the last
step. Numbers of training, and the two ablations over time, come from episodes at T = 1. ``tokens``
are the policy's own, ``reward`` is the mean of the last tenth of the steps, ``early`` means the
first third of them, ``fall`` is how far the mean reward of five steps fell below its best. In the
ablation of turns, ``tokens to .3`` is what was sampled until the exact match of held-out questions
at T = 1 was .3, and ``em at equal tokens`` compares two arms where the run that spent least ended;
so do the same numbers of searches. Tables show the mean of the seeds, and lowest to highest.

**Verdicts.** A finding "A is above B" is *as in the paper* if every seed of A is above every seed
of B, *the other way* if every one is below, and otherwise the two *cannot be told apart*. With
three seeds that is weak evidence: if there is no difference at all, one comparison in ten comes out
one way or the other by chance (2 of the 20 ways to order six values), and the ablations make some
forty. Nor does a world of 1,320 passages speak for the papers' models.
"""
