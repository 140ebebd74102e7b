"""The prompts of the three papers, word for word, for base and for instruction-tuned models.

A prompt is data: a model that was trained with one must be evaluated with the same. The texts are
those of the authors' training code:

- research: Chen et al. 2025, "ReSearch", ``verl/utils/dataset/template.py``
- r1-searcher: Song et al. 2025, "R1-Searcher", ``openrlhf/datasets/prompts_dataset.py``. Both of
  its prompts end in ``<think>``, so its responses open no think tag of their own.
- search-r1: Jin et al. 2025, "Search-R1", ``scripts/data_process/qa_search_train_merge.py``. One
  text serves both kinds of model, as the only message of the user where there is a chat template;
  the question gets a question mark where it has none.
"""

from __future__ import annotations

from research_env.errors import UnknownNameError
from research_env.protocol import Protocol

Message = dict[str, str]

_RESEARCH_BASE = (
    "A conversation between User and Assistant. "
    "The user asks a question, and the assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. "
    "During thinking, the assistant can invoke the wikipedia search tool to search for fact "
    "information about specific topics if needed. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags respectively, "
    "and the search query and result are enclosed within <search> </search> and <result> </result> "
    "tags respectively. "
    "For example, <think> This is the reasoning process. </think> <search> search query here "
    "</search> <result> search result here </result> "
    "<think> This is the reasoning process. </think> <answer> The final answer is "
    "\\[ \\boxed{answer here} \\] </answer>. "
    "In the last part of the answer, the final exact answer is enclosed within \\boxed{} with "
    "latex format. "
    "User: {question}. Assistant:"
)

_RESEARCH_SYSTEM = (
    "You are a helpful assistant that can solve the given question step by step with the help of "
    "the wikipedia search tool. "
    "Given a question, you need to first think about the reasoning process in the mind and then "
    "provide the answer. "
    "During thinking, you can invoke the wikipedia search tool to search for fact information "
    "about specific topics if needed. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags respectively, "
    "and the search query and result are enclosed within <search> </search> and <result> </result> "
    "tags respectively. "
    "For example, <think> This is the reasoning process. </think> <search> search query here "
    "</search> <result> search result here </result> "
    "<think> This is the reasoning process. </think> <answer> The final answer is "
    "\\[ \\boxed{answer here} \\] </answer>. "
    "In the last part of the answer, the final exact answer is enclosed within \\boxed{} with "
    "latex format."
)

_R1_SEARCHER_BASE = (
    "The User asks a question, and the Assistant solves it.\n"
    "The Assistant first thinks about the reasoning process in the mind and then provides the User "
    "with the final answer.\n"
    "The output format of reasoning process and final answer are enclosed within <think> </think> "
    'and <answer> </answer> tags, respectively, i.e., "<think> reasoning process here </think>\n'
    "\n"
    '<answer> final answer here </answer>".\n'
    "During the thinking process, **the Assistant can perform searching** for uncertain knowledge "
    'if necessary with the format of "<|begin_of_query|> search query (only list keywords, such as '
    '**"keyword_1 keyword_2 ..."**)<|end_of_query|>". **A query must involve only a single '
    "triple**.\n"
    "Then, the search system will provide the Assistant with the retrieval information with the "
    'format of "<|begin_of_documents|> ...search results... <|end_of_documents|>".\n'
    "\n"
    "User:{question}\n"
    "Assistant: <think>"
)

_R1_SEARCHER_SYSTEM = (
    "You are a helpful assistant.\n"
    "Given a question, you should answer it by first thinking about the reasoning process in the "
    "mind and then providing the final answer.\n"
    "The output format of reasoning process and final answer are enclosed within <think> </think> "
    'and <answer> </answer> tags, respectively, i.e., "<think> reasoning process here </think>\n'
    "\n"
    '<answer> final answer here </answer>".\n'
    "During the thinking process, **you can perform searching for uncertain knowledge** if "
    'necessary with the format of "<|begin_of_query|> search query (only list keywords, such as '
    '**"keyword_1 keyword_2 ..."**)<|end_of_query|>". **A query must involve only a single '
    "triple**.\n"
    "Then, the search system will provide you with the retrieval information with the format of "
    '"<|begin_of_documents|> ...search results... <|end_of_documents|>".'
)

_SEARCH_R1 = (
    "Answer the given question. "
    "You must conduct reasoning inside <think> and </think> first every time you get new "
    "information. "
    "After reasoning, if you find you lack some knowledge, you can call a search engine by "
    "<search> query </search> and it will return the top searched results between <information> "
    "and </information>. "
    "You can search as many times as your want. "
    "If you find no further external knowledge needed, you can directly provide the answer inside "
    "<answer> and </answer>, without detailed illustrations. For example, <answer> Beijing "
    "</answer>. Question: {question}\n"
)

TEMPLATES = ("base", "instruct", "question")
"""The names of the templates; ``question`` is the bare question and a newline, for small models."""

_CONVERSATIONS: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "research": {
        "base": (("user", _RESEARCH_BASE),),
        "instruct": (("system", _RESEARCH_SYSTEM), ("user", "{question}")),
    },
    "r1-searcher": {
        "base": (("user", _R1_SEARCHER_BASE),),
        "instruct": (
            ("system", _R1_SEARCHER_SYSTEM),
            ("user", "{question}"),
            ("assistant", "<think>"),
        ),
    },
    "search-r1": {"base": (("user", _SEARCH_R1),), "instruct": (("user", _SEARCH_R1),)},
}


def messages(protocol: str | Protocol, template: str, question: str) -> list[Message]:
    """The prompt as chat messages, for a model with a chat template.

    Args:
        protocol: a protocol or its name.
        template: ``base``, ``instruct`` or ``question``.
        question: the question, put in as it is (nothing in it is syntax).

    Returns:
        Messages of ``role`` and ``content``. Where the last one is the assistant's (r1-searcher's
        ``instruct``), the model continues it rather than opening a turn of its own.

    Raises:
        UnknownNameError: no such template, or no paper's template for this protocol.
    """
    if template not in TEMPLATES:
        raise UnknownNameError("template", template, TEMPLATES)
    if template == "question":
        return [{"role": "user", "content": f"{question}\n"}]
    name = protocol if isinstance(protocol, str) else protocol.name
    if name not in _CONVERSATIONS:
        raise UnknownNameError(
            "protocol", name, _CONVERSATIONS, hint="Any protocol has the template 'question'."
        )
    if name == "search-r1":
        question = question.strip()
        question += "" if question.endswith("?") else "?"
    return [
        {"role": role, "content": content.replace("{question}", question)}
        for role, content in _CONVERSATIONS[name][template]
    ]


def prompt(protocol: str | Protocol, template: str, question: str) -> str:
    """The prompt as text: the first observation of an episode.

    Args:
        protocol: a protocol or its name.
        template: ``base``, ``instruct`` or ``question`` (exactly the question and a newline).
        question: the question, put in as it is (nothing in it is syntax).

    Returns:
        The text of the one message, or the contents of several with blank lines between them, for
        a model that has an ``instruct`` prompt but no chat template.

    Raises:
        UnknownNameError: no such template, or no paper's template for this protocol.
    """
    return "\n\n".join(message["content"] for message in messages(protocol, template, question))
