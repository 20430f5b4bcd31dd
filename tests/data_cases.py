"""Models that only say what they read: the data side needs no more."""

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mpq.inputs import Images, Tokens
from mpq.models import Model
from mpq.tasks import TASKS

WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz", *(f"w{i}" for i in range(2000)))
PAD, CLS, SEP = 0, 1, 2


def model(inputs, task, tokenizer=None, preprocessor=None):
    """A model of these inputs and this task; it has no function."""
    config = {} if preprocessor is None else {"preprocessor": preprocessor}
    return Model(lambda params, x: x, {}, {}, "toy", inputs, TASKS[task], config, tokenizer)


def encoder(task="embedding", context=8, pad=PAD):
    """An encoder of words with `[CLS] ... [SEP]`."""
    return model(Tokens(context, pad=pad), task, word_tokenizer())


def images(task="classification", height=2, width=3, channels=3, preprocessor=None):
    """A model of small images."""
    return model(Images(height, width, channels), task, preprocessor=preprocessor)


def write_images(path, train, test):
    """So many random images of 16 x 16 pixels in three classes, as the file of CIFAR-10 has them."""
    rng, sizes = np.random.default_rng(0), {"train": train, "test": test}
    pixels = {f"{name}_x": rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for name, n in sizes.items()}
    np.savez(path, **pixels, **{f"{name}_y": rng.integers(0, 3, n) for name, n in sizes.items()})


def word_tokenizer(words=WORDS):
    """One token a word."""
    result = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    result.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    result.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return result


def word_ids(text):
    """Ids of the words of a text, without special tokens: the oracle of the tokenizer."""
    return [WORDS.index(word) if word in WORDS else WORDS.index("[UNK]") for word in text.split()]


def pixels(count, height=2, width=3, channels=3, seed=0):
    """Random images, no two of which are equal."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), np.uint8)
