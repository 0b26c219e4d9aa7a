"""Looking inside: what positions and codes are, how a model predicts them, and what causes what.

positions.py   entropy, usage and special positions; mutual information between positions
pair_counts.py pairs of codes counted by block of lines, so that random halves are sums
lattice.py     which cell of a grid each position is, from what positions share alone
grid.py        from these, the grid the codes were read from, or that there is none
codebook.py    frequency, burstiness, places, neighbours, clusters and exchangeable codes
attention.py   attention weights, heads named by what they do; surprise; loss against context length
causes.py      logit lens, ablation, activation patching, changing one code
captions.py    nats of each patch with and without a caption; which word moves which patch
memorisation.py training pictures nearest to a drawn one, beside those nearest to new ones
hooks.py       TransformerLens' names for what goes on inside a model
words.py       which word a picture's codes look at; contradicted and swapped words
patches.py     what codes look like, where an image tokenizer exists
sequences.py   codes as the sequences a model reads
subject.py     what a report is about: a bundle and its data
findings.py    all of it in words and numbers
figures.py     the pictures to them
report.py      one HTML page of findings; each names the function that computed it
"""
