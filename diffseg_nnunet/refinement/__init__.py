"""HiDiff: a Bernoulli-diffusion refiner for any trained segmentor. Knows no nnU-Net.

Chen, Wang, Chen, Lei, Shan, IEEE TMI 2024, arXiv 2407.03548. The paper's own equations were not at hand: the formulas
are those of its released code, as methods.md writes them down; numbers are its sections, [default] is ours.

Formula → where it is:

======================================================================  ====  =========================================
q(y_t | y_{t-1}, p) = B((1 - β) y_{t-1} + β p)                          3.1   ``BernoulliDiffusion.transition``
q(y_t | y_0, p) = B(ᾱ y_0 + (1 - ᾱ) p)                                  3.1   ``BernoulliDiffusion.marginal``
posterior th2 / (th1 + th2), as log-odds                                3.1   ``BernoulliDiffusion.posterior``
y_T ~ B(p)                                                              3.1   ``BernoulliDiffusion.start``
ε = y_t XOR y_0;  y_0 = |y_t - ε|                                       3.1   ``exclusive_or``, ``clean_log_odds``
DDIM: B(σ y_t + (ᾱ_{t-1} - σ ᾱ_t) y_0)                                  3.1   ``BernoulliDiffusion.ddim``
T = 10, squared cosine                                                  3.2   ``BernoulliSettings``
U-Net, conditions, cross transformer                                    3.3   ``network``, ``blocks``, ``attention``
sign(W) mean |W|;  sign(x), derivative 2 - 2 |x|;  b1, b2, b3(t)        3.3   ``binary``, ``blocks.BinaryBlock``
L = L_vb + L_focal, in bits                                             3.4   ``diffusion.bernoulli_loss``
two half-steps a batch, diff_weight                                     3.5   ``losses``
y_T → … → y_0, mean of samples                                          3.5   ``sampling.refine``
worse priors to learn from [default]                                          ``degradation``
======================================================================  ====  =========================================

Defect of the released code (3.8) → what is done here; those missing here concern its trainer, its data or other works:

==  ==================================================================  ===============================================
1   "linear" betas pass 1 at T = 10                                     every schedule is within (0, 1] at every T
2   the full-precision network returns nothing                          one network, ``binary`` is an argument
3   uninitialised bias, weights all positive                            no bias before a norm; symmetric weights
4   softmax over one class is always 1                                  two classes, or sigmoids of regions (``masks``)
5   the transformer's initialisation does nothing                       layers initialise themselves
6   the network runs twice for one loss                                 both losses are of one output
7   ᾱ_{t-1} wraps around at index 0                                     a row of its own, ᾱ = 1 before index 0
8   the segmentor has to return its loss, too                          losses take prior and features, from wherever
9   priors of 0 and 1                                                   clamped to [1e-4, 1 - 1e-4]; losses by log-odds
10  full precision is the default, the paper's is binary                full precision by choice: it refined no worse
11  BerDiff's mean loses a term                                         the marginal is tested by enumeration
13  list of condition channels read as characters                       a checked tuple, from the planner
16  square grids of tokens, nine classes                                any grid, any number of classes
==  ==================================================================  ===============================================

Where this differs from the released code, by choice [default]: 3D beside 2D; grids, widths and kernels of the planned
segmentor; instance and layer norms for batch norms; the refiner starts from the prior and not from 1/2, and its
layers speak of y_0 instead of the flip (``Refiner``);
the attention map is a softmax in the binary network, too (``CrossAttention``); linear layers are binarised like
convolutions, without centring the weights, which packing could not restore; divergences carry no 1e-7.
"""
