"""Looking inside: what positions and codes are, how a model predicts them, and what causes what.

positions.py   entropy, usage and special positions; mutual information between positions
grid.py        from it, the grid the codes were read from
codebook.py    frequency, burstiness, places, neighbours, clusters and exchangeable codes
attention.py   attention weights, heads named by what they do; surprise; loss against context length
causes.py      logit lens, ablation, activation patching, changing one code
words.py       which word a picture's codes look at; contradicted and swapped words
patches.py     what codes look like, where an image tokenizer exists
sequences.py   codes as the sequences a model reads
subject.py     what a report is about: a bundle and its data
findings.py    all of it in words and numbers
figures.py     the pictures to them
report.py      one HTML page of findings; each names the function that computed it
"""
