"""Trains a tiny T5 to translate German into English, sharpness-aware, with HuggingFace's Seq2SeqTrainer.

    python -m recipes.examples.t5_translation [--pairs N] [--epochs N] [--rho RHO]

The sentences are made by data_prep.generated and the model from its configuration: nothing is downloaded.
Prints the logs of the training, and BLEU of 100 sentences that it has not seen.
"""

import argparse
import tempfile

import sacrebleu
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration, set_seed

from data_prep.generated import pairs
from fairseq_asam.integrations.huggingface import SharpnessAwareSeq2SeqTrainer

PAD, END = 0, 1  # as in T5's configuration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rho", type=float, default=0.1)
    arguments = parser.parse_args()
    set_seed(1)
    sentences = [(p.source.split(), p.target.split()) for p in pairs(arguments.pairs + 100, seed=1)]
    words = sorted({word for pair in sentences for sentence in pair for word in sentence})
    numbers = {word: number for number, word in enumerate(words, start=2)}

    def batch(items: list[tuple[list[str], list[str]]]) -> dict[str, torch.Tensor]:
        sides = ([torch.tensor([*map(numbers.get, words), END]) for words in side] for side in zip(*items))
        source, target = (pad_sequence(side, batch_first=True, padding_value=PAD) for side in sides)
        return {
            "input_ids": source,
            "attention_mask": source != PAD,
            "labels": target - 100 * (target == PAD),
        }

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
    config = T5Config(vocab_size=len(words) + 2, decoder_start_token_id=PAD, **sizes)
    unseen, seen = sentences[:100], sentences[100:]
    with tempfile.TemporaryDirectory() as folder:
        options = {"learning_rate": 5e-3, "num_train_epochs": arguments.epochs, "report_to": []}
        options |= {"remove_unused_columns": False, "logging_strategy": "epoch", "save_strategy": "no"}
        training = Seq2SeqTrainingArguments(folder, per_device_train_batch_size=32, **options)
        model = T5ForConditionalGeneration(config)
        SharpnessAwareSeq2SeqTrainer(model, training, batch, seen, rho=arguments.rho).train()
    source = {name: tensor for name, tensor in batch(unseen).items() if name != "labels"}
    made = model.eval().generate(**source, max_new_tokens=30).tolist()
    translations = [" ".join(words[number - 2] for number in row if number > END) for row in made]
    print("BLEU", sacrebleu.corpus_bleu(translations, [[" ".join(target) for _, target in unseen]]).score)


if __name__ == "__main__":
    main()
