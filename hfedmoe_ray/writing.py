"""Letting a language model write: what a run trained, or any that transformers loads."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfedmoe_ray.data.tokenize import pad_id
from hfedmoe_ray.errors import ConfigError, ModelError
from hfedmoe_ray.export import export_run
from hfedmoe_ray.moe.sources import resolve

Turn = Mapping[str, str]
"""`role` (user or assistant) and `content`."""


class Writer:
    """A language model and its tokenizer."""

    def __init__(self, directory: Path) -> None:
        """Loads both from a directory that save_pretrained wrote.

        Raises:
            ModelError: It is no language model.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        from hfedmoe_ray.moe.quiet import quiet_transformers

        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
                self._translates = bool(getattr(config, "is_encoder_decoder", False))
                auto = AutoModelForSeq2SeqLM if self._translates else AutoModelForCausalLM
                self._model = auto.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False).eval()
                self._tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{directory} holds no language model that transformers can load: {error}. Give a run with "
                "`model.task: causal` or seq2seq, or a model that writes."
            ) from error

    def write(self, conversation: Sequence[Turn], *, max_tokens: int, temperature: float, seed: int) -> str:
        """Returns what the model writes next.

        Args:
            conversation: Turns so far, the last one the user's. Without a chat template only that one is read.
            max_tokens: Most tokens to write.
            temperature: 0: the likeliest token each time.
            seed: Of what is drawn otherwise.
        """
        import torch

        if getattr(self._tokenizer, "chat_template", None):
            text = self._tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
            inputs = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)
        else:
            inputs = self._tokenizer(conversation[-1]["content"], return_tensors="pt")
        drawn = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed)
            ids = self._model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_tokens,
                pad_token_id=pad_id(self._tokenizer),
                **drawn,
            )
        # A decoder alone goes on with what it was given; after an encoder it begins anew.
        given = 0 if self._translates else inputs["input_ids"].shape[1]
        written: Any = self._tokenizer.decode(ids[0, given:], skip_special_tokens=True)
        return str(written).strip()


@contextmanager
def opened(source: str) -> Iterator[Writer]:
    """Yields the model of a run's directory, of a model's directory or file, of a package or of the hub.

    Raises:
        ConfigError: The run trained a classifier.
        ModelError: There is no such model, or it does not write.
        CheckpointError: The run has no complete round.
    """
    if not (Path(source) / "checkpoints").is_dir():
        yield Writer(resolve(source, None))
        return
    from hfedmoe_ray.config.load import load_experiment

    if load_experiment(Path(source) / "config.yaml").model.task == "classification":
        raise ConfigError(f"{source} trained a classifier, which writes nothing: `hfedmoe evaluate` tells how it does.")
    with tempfile.TemporaryDirectory(prefix="hfedmoe-writer-") as temporary:
        export_run(Path(source), "hf", Path(temporary) / "model")
        yield Writer(Path(temporary) / "model")
