"""What is asked and answered: OpenAI's completions, and what a sampler of ELF takes beside it."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, model_validator

from elf_rt.request import MAX_SEED
from elf_rt.serve.errors import bad_request

MAX_TEXTS = 128  # of one request
MAX_CHARACTERS = 100_000  # of a prompt, a suffix or a template
MAX_MS = 86_400_000  # of a deadline: a day

_ONE_BY_ONE = "every token of a text is written at once, so no token is drawn or weighed by itself"
MEANINGLESS: dict[str, tuple[tuple[Any, ...], str]] = {  # field -> (values that ask for nothing, why there is no other)
    "logprobs": ((None,), _ONE_BY_ONE),
    "top_p": ((None, 1), _ONE_BY_ONE),
    "top_k": ((None, -1, 0), _ONE_BY_ONE),
    "logit_bias": ((None, {}), _ONE_BY_ONE),
    "frequency_penalty": ((None, 0), _ONE_BY_ONE),
    "presence_penalty": ((None, 0), _ONE_BY_ONE),
    "repetition_penalty": ((None, 1), _ONE_BY_ONE),
    "stop": ((None, []), "a text ends where the model ends it: cut it where you like"),
    "ignore_eos": ((None, False), "a text ends where the model ends it"),
    "best_of": ((None, 1), "there is no score to choose by: ask for n texts and choose"),
    "echo": ((None, False), "the prompt is the source of a text, not its beginning"),
    "tools": ((None, []), "the model writes text and calls nothing"),
    "tool_choice": ((None, "none"), "the model writes text and calls nothing"),
    "response_format": ((None, {"type": "text"}), "a form is given as a template with blanks"),
    "messages": ((None,), "there is no chat: put the source text into prompt"),
}

Words = Annotated[str, StringConstraints(max_length=MAX_CHARACTERS)]
Count = Annotated[int, Field(ge=1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool | None = None


class CompletionRequest(BaseModel):
    """Fields that are absent or null are the preset's, or asked for by nobody."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: Words | None = None
    prompt: Words | Annotated[list[Words], Field(min_length=1, max_length=MAX_TEXTS)] | None = Field(
        None, description="The source text, or several; absent for a model that takes none."
    )
    n: int = Field(1, ge=1, le=MAX_TEXTS, description="Texts for each prompt.")
    seed: int | None = Field(None, ge=0, lt=MAX_SEED, description="Text k has seed + k; drawn at random when absent.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    suffix: Words | None = Field(None, description="Stands after max_tokens tokens; what is before it is the answer.")
    max_tokens: Count | None = Field(None, description="The answer is cut to so many tokens.")
    user: Words | None = None

    preset: Words | None = Field(None, description="Of the bundle; see /v1/models.")
    steps: Count | None = Field(None, validation_alias=AliasChoices("steps", "num_denoising_steps"))
    sampler: Words | None = None
    schedule: Words | None = None
    guidance_scale: FiniteFloat | None = None
    sc_cfg: FiniteFloat | None = Field(None, description="Scale of self-conditioning guidance.")
    gamma: FiniteFloat | None = Field(None, description="Noise of the SDE sampler.")
    temperature: FiniteFloat | None = Field(None, description="Factor on all noise.")
    length: Count | None = Field(None, description="Tokens of canvas; other lengths than the trained one change texts.")
    template: Words | None = Field(None, description="Text with blanks of n tokens: She paid [2] for the chair.")
    diffusing: bool | None = Field(None, description="With stream: send drafts, each the whole text of its step.")
    drafts_every: int | None = Field(None, ge=0, description="Steps from draft to draft. [default: 1]")
    deadline_ms: Annotated[int, Field(ge=1, le=MAX_MS)] | None = Field(
        None, description="Refuse at once what would take longer, and drop what does."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_meaningless(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, (neutral, reason) in MEANINGLESS.items():
            if name in values and values[name] not in neutral:
                raise bad_request(f"{name} has no meaning here: {reason}", name, "unsupported_parameter")
        return {name: value for name, value in values.items() if name not in MEANINGLESS and value is not None}

    @model_validator(mode="after")
    def _fit_together(self) -> "CompletionRequest":
        if self.num_texts > MAX_TEXTS:
            raise bad_request(f"prompts times n must be at most {MAX_TEXTS}, got {self.num_texts}", "n")
        if self.diffusing and not self.stream:
            raise bad_request("diffusing sends drafts: it needs stream", "diffusing")
        if self.drafts_every and not self.diffusing:
            raise bad_request("drafts_every is of drafts: it needs stream and diffusing", "drafts_every")
        if self.suffix is not None and self.max_tokens is None:
            raise bad_request("suffix needs max_tokens: the tokens of text before it", "suffix")
        if self.suffix is not None and self.template is not None:
            raise bad_request("give suffix or template, not both", "suffix")
        return self

    @property
    def prompts(self) -> list[str | None]:
        return list(self.prompt) if isinstance(self.prompt, list) else [self.prompt]

    @property
    def num_texts(self) -> int:
        return len(self.prompts) * self.n


class CompletionTimings(BaseModel):
    """Milliseconds of a text. predicted: what was expected when it was accepted; waited: until its first network call;
    network: of the calls that it shared. calls: network calls, drafts included."""

    total_ms: float
    waited_ms: float
    network_ms: float
    predicted_ms: float | None
    calls: int


class Choice(BaseModel):
    text: str
    index: int
    seed: int
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None
    timings: CompletionTimings | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """An answer, or an event of a stream. step, steps and t: of a draft, which holds the whole text."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None = None
    diffusing: bool | None = None
    step: int | None = None
    steps: int | None = None
    t: float | None = None

    def line(self) -> str:
        """JSON without the fields that only drafts or last events have."""
        return self.model_dump_json(exclude={name for name, value in self if value is None})


class ModelCard(BaseModel):
    """conditional: whether it takes a prompt. max_length: tokens of its canvas. presets: fields by name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "elf-rt"
    conditional: bool
    max_length: int
    engine: str
    presets: dict[str, dict[str, Any]]
    samplers: list[str]
    schedules: list[str]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
