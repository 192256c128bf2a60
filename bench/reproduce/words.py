"""What the page says beside its figures. Braces are filled in from the plan."""

TITLE = """\
# The papers' experiments again

`make reproduce DATA=...` trained these networks and wrote this page from its results file, a JSON line a run. It skips
the runs that the file has; `RESULTS=other.jsonl` begins a file of one's own and writes its page beside it.
"""

COMES_OUT = """\
## What comes out

Of {total} orderings that the papers state, {clear} come out, {noise} are within the noise of the seeds ({signs} of
them with the paper's sign), {against} come out the other way round{missing}. An ordering comes out where the 95 %
interval of the mean difference, taken seed by seed, is on its side of zero; of so many intervals one or two are wrong
by chance.
"""

HOW = """\
## How

Census-Income, tasks income above 50 000, never married, and education of at least college; the inputs are the 38 other
columns, embeddings of 4 for the categories. One official file is split 60/20/20 by seed 0 into training, validation and
test rows (`census-income.test`: 59 857, 19 952 and 19 953); where both are given, `census-income.data` trains and the
other one is halved, as in the papers.

Every network gets the same: {experts} experts a level over all tasks, widths 128 and 64, towers of 32 (AdaTT, section
4.3); the sum of the tasks' cross entropies; Adam, batch {batch}, at most {epochs} epochs. The rate is the better of
{rates} on the validation loss of one run with a seed of its own, the epoch that of the least validation loss of each
run. Then {seeds} seeds. The test rows choose nothing.

What differs from the papers: AdaTT, CGC and PLE have one expert a task and three shared ones, a number that the AdaTT
paper tunes. STAR takes the task as the domain of a row, so every row comes three times. MRN's prior is divided by the
number of training rows, for the loss is a mean over rows. BranchedMTL shares its first level and parts behind it.
ESMM needs a label that follows from another and has a study of
its own.

MMoE's synthetic study: 100 inputs, 8 experts of 16 and towers of 8, SharedBottom with 113 units, which makes about as
many parameters; {synthetic_rows:,} training rows drawn anew for every seed, batch {synthetic_batch}, {synthetic_epochs}
epochs, {synthetic_seeds} seeds, a rate of {synthetic_rates} chosen as above. The paper gives neither the length of the
tasks' weights nor the number of sines: 5 sines, and weights of length 0.3, as the first public code has it, at which
the sines are nearly straight and every task is easy; and of length 1, at which they are not.
"""

RATES = """\
So few epochs favour the larger rate: of the table's networks it was chosen for all but {slow}. More epochs, and a wider
grid, may change places that are close. LearnedBranching and AdaShare look for their structure in the same few epochs
and have no second training of what they found.
"""

MADE = """\
Made with {what}. The same code, versions and threads give the same digits again; a change that only rounds otherwise
gives other runs of the same spread.
"""

TABLE = """\
## The table

Test AUC, mean ± standard deviation over the seeds, the best mean over the tasks first. NE is the log loss over that of
the base rate, less is better. Beside SharedBottom: the difference of the mean AUC, seed by seed, in units of 0.0001,
± half of its 95 % interval. Logistic regression is one a task and has no seeds.
"""

PAPERS = """\
## Beside the papers

AdaTT's own figures on Census-Income (table 5: 199 523 training rows, means of 100 runs, columns told by their levels)
and ours. Where ours are higher, they are so for every network: other inputs and another training, not another network.
"""

ORDERINGS = """\
Every ordering, the difference in units of 0.0001 of test AUC ± half of its 95 % interval, positive where the paper's
holds. Tables 1 to 4 and 6 to 8 of AdaTT are of short videos, 70 thousand million rows and two to five tasks, where the
differences are 0.1 to 1 % of the normalised entropy: that Census-Income shows the same is more than they say.
"""

STUDIES = {
    "residual": "**Without the residual.** NativeExpertLF is left out (AdaTT, section 4.4). Test AUC:\n",
    "experts": "**Experts a task.** AdaTT-sp with two levels, 128 and 64 (AdaTT, section 4.6.1). Test AUC:\n",
    "levels": """\
**Levels.** AdaTT-sp with one expert a task; the widths halve from level to level and end in 64 and 32, a quarter of the
paper's (AdaTT, section 4.6.2). Test AUC:
""",
}

FUNNEL = """\
## ESMM

Education stands for the click, education and income above 50 000 for the conversion: a stand-in, for Census-Income has
no funnel. The second task is over all rows, ESMM's pCTCVR. Test AUC:
"""

SYNTHETIC = """\
Test mean squared error at the end, of which 0.01 is noise that no network can learn: the median of the seeds, and the
least and the largest. What a seed draws decides much of it, and single runs stay stuck with many times the error of the
others, so differences are those of the logarithm, seed by seed.
"""

SYNTHETIC_ORDERINGS = """\
The orderings of the paper, the difference in per cent of the error ± half of its 95 % interval, positive where the
paper's holds. At correlation 1 the paper finds OMoE and MMoE alike, so no order is asked for there.
"""
