"""What shards of questions are made of: the data, the vision tower's preprocessing and the text
tower's tokens.
"""

from collections.abc import Callable

from minilora.data.questions.vqa_batches import Texts
from minilora.data.vqa_sets import VQASplits
from minilora.settings.flags import Config
from minilora.tasks.method import resolve
from minilora.tasks.towers import DEFAULT_MODEL, open_tokenizer, positions, tower_names, tower_of, tower_weights
from minilora.tasks.vqa.task import open_data
from minilora.tasks.weights import load_base, picture_flags
from reference_models.load import config_of
from reference_models.text.tokenizers import Tokenizer


def prepare(config: Config) -> tuple[VQASplits, dict, Tokenizer, int, Callable]:
    """(splits, preprocess, tokenizer, longest text in tokens, part -> the token ids
    of its questions)."""
    resolve(config, DEFAULT_MODEL)
    splits = open_data(config)
    weights = tower_weights(config)
    names, settings = tower_names(config)
    sizes = (None, config.image_size, picture_flags(config))
    whole, _ = load_base(names["vision"], weights["vision"], config.seed, *sizes, **settings)
    tokenizer = open_tokenizer(config, weights)
    text = config_of(names["text"])
    text = getattr(text, "text", text)
    longest, tokenizer.fill = positions(text), getattr(text, "fill", None)
    limit = min(config.max_length or tokenizer.max_length, longest or tokenizer.max_length)

    def tokens(part):
        texts = Texts(part.questions, tokenizer, limit)
        return [texts.ids[row] for row in texts.row]

    return splits, tower_of(whole, "vision").preprocess, tokenizer, limit, tokens
