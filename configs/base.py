"""Every field of a config once, with its unit and meaning.

Plain data: no jax, no pal_jax. An experiment's config starts from
`get_config()` and changes fields; unknown fields are refused when locked.
Empty means '' or 0.0 here, never None: a field whose default is None could
not be set from the command line.
"""

from ml_collections import ConfigDict


def persona_data() -> ConfigDict:
  """Personas with stances on behaviours (METHOD section 4)."""
  data = ConfigDict()
  data.name = 'persona'
  # Folder that holds persona/*.jsonl; '' is the corpus inside the package.
  data.path = ''
  # File names without .jsonl. On the command line:
  # --config.data.behaviors="('risk-seeking', 'extraversion')".
  data.behaviors = (
    'politically-liberal',
    'subscribes-to-Christianity',
    'interest-in-sports',
    'extraversion',
  )
  data.num_personas = 4  # K*, true personas
  data.stances = 'signed'  # 'signed': vectors of +-1; 'own': one behaviour each
  data.form = 'statements'  # or 'yes_no': the question, answered Yes or No
  data.num_seen_users = 200  # they have training comparisons
  data.num_unseen_users = 100  # met only after training
  data.comparisons_per_user = 40  # training comparisons of a seen user
  data.validation_per_user = 20  # of a seen user, on validation statements
  data.seen_query = 50  # test comparisons of a seen user
  data.unseen_support = 50  # comparisons an unseen user may adapt from
  data.unseen_query = 50  # test comparisons of an unseen user
  data.cross_fraction = 0.5  # share of pairs of statements of two behaviours
  data.label_noise = 0.0  # probability that a training label is flipped
  data.support_noise = 0.0  # the same for unseen users' support labels
  data.mixture = 0.0  # Dirichlet concentration; 0.0: a user is one persona
  data.validation_fraction = 0.1  # share of the statements
  data.test_fraction = 0.3  # share of the statements, the "unseen" ones
  data.seed = 0  # of personas, users, splits and comparisons
  return data


def downloaded_persona_data() -> ConfigDict:
  """The published statements, fetched and prepared by TFDS."""
  data = persona_data()
  data.download = True
  data.tfds_dir = ''  # of what is prepared; '' is TFDS's own
  return data


def simulation_data() -> ConfigDict:
  """Planted prototypes and items, Gaussian in R^P (METHOD section 4)."""
  data = ConfigDict()
  data.name = 'simulation'
  data.num_personas = 4  # K*, planted prototypes
  data.dimension = 8  # P of the planted space, and D of the features
  data.num_items = 2000
  data.num_seen_users = 200
  data.num_unseen_users = 100
  data.comparisons_per_user = 100
  data.validation_per_user = 20
  data.seen_query = 50
  data.unseen_support = 50
  data.unseen_query = 50
  data.label_noise = 0.0
  data.support_noise = 0.0
  data.mixture = 0.0
  data.validation_fraction = 0.1
  data.test_fraction = 0.3
  data.seed = 0
  return data


def neural_process_data() -> ConfigDict:
  """The one-dimensional toy with a known optimum (METHOD section 4)."""
  data = simulation_data()
  data.name = 'neural_process'
  data.num_personas = 2
  data.dimension = 1
  return data


def low_rank_data() -> ConfigDict:
  """Linear rewards that differ in a few directions, or not at all."""
  data = simulation_data()
  data.name = 'low_rank'
  data.num_personas = 1
  data.dimension = 16  # D
  data.rank = 3  # directions in which people differ
  data.spread = 1.0  # standard deviation in each; 0.0: everybody is alike
  # Scale of Gumbel noise on each utility whenever somebody answers, in tests
  # too. 0.0: the better one always wins; 1.0: the Bradley-Terry model.
  data.choice_noise = 0.0
  return data


def length_data() -> ConfigDict:
  """Labels by length alone, as in the TL;DR variant (METHOD section 4)."""
  data = simulation_data()
  data.name = 'length'
  data.num_personas = 2
  data.dimension = 16  # D, of which one is the length
  data.short_share = 0.3  # of the people want the shorter text
  return data


def _people_data() -> ConfigDict:
  """What datasets of real people share (METHOD sections 4 and 5)."""
  data = ConfigDict()
  data.name = ''
  data.path = ''  # folder of the download; must be given
  data.unseen_fraction = 0.3  # share of the people, met only after training
  data.validation_fraction = 0.1  # share of the items
  data.test_fraction = 0.3  # share of the items, the "unseen" ones
  data.min_comparisons = 5  # for training; seen users with fewer are left out
  # Share of a seen user's comparisons on train items that is tested on.
  data.heldout_fraction = 0.2
  data.max_query = 50  # comparisons of a user in a validation or test set
  data.min_support = 10  # unseen users who have fewer are left out
  # Above min_support, few-shot curves past it are of fewer and fewer users.
  data.max_support = 10  # comparisons an unseen user may adapt from
  data.min_query = 3  # on test items; unseen users with fewer are left out
  data.seed = 0  # of who is unseen, of the items' split and of the pairs
  return data


def polis_data() -> ConfigDict:
  """Votes on statements in a Polis conversation."""
  data = _people_data()
  data.name = 'polis'
  # Folder in data.path that holds comments.csv and participants-votes.csv.
  data.conversation = 'american-assembly.bowling-green'
  data.max_pairs_per_user = 40  # training comparisons of a seen user
  data.max_pairs_per_statement = 4  # of them, those with the same statement
  return data


def convarg_data() -> ConfigDict:
  """UKPConvArg1: crowd workers on which argument is more convincing."""
  data = _people_data()
  data.name = 'convarg'
  data.ties = 'drop'  # or 'keep': judged equal, with the label 0.5
  # A pair is used if both its arguments are of one split, and half of the
  # workers judged six pairs or fewer.
  data.validation_fraction = 0.15
  data.test_fraction = 0.35
  # Training comparisons of a seen user: one worker judged a tenth of all.
  data.max_pairs_per_user = 200
  data.min_comparisons = 2
  data.min_support = 5
  data.max_support = 5
  return data


def table_data() -> ConfigDict:
  """A table of your own: Parquet, CSV or JSON lines, a comparison a row."""
  data = _people_data()
  data.name = 'table'  # data.path is the file
  # Names of the columns. Those of the first line must be there; instead of
  # responses and label there may be chosen and rejected.
  data.columns = ConfigDict()
  data.columns.user = 'user_id'
  data.columns.response_a = 'response_a'
  data.columns.response_b = 'response_b'
  data.columns.label = 'label'  # probability that a is better: 1, 0, 0.5 a tie
  data.columns.chosen = 'chosen'
  data.columns.rejected = 'rejected'
  data.columns.prompt = 'prompt'
  data.columns.weight = 'weight'  # in the training loss, from 0 on
  data.columns.group = 'group'  # of the user, for the adjusted Rand index
  data.columns.time = (
    'time'  # a number: what is learnt comes before what is asked
  )
  # train, validation, test, test_seen_items; support, query, query_seen_items
  # of unseen users; unused. Without it splits are drawn, and the run writes
  # them to splits.csv.
  data.columns.split = 'split'
  data.on_problem = 'refuse'  # or 'drop': rows with problems are left out
  data.min_comparisons = 2
  data.min_support = 5
  data.max_support = 20
  data.min_query = 1
  data.max_pairs_per_user = 1000  # training comparisons of a seen user
  return data


def _prepared_data() -> ConfigDict:
  """What datasets that TFDS prepares share."""
  data = ConfigDict()
  data.name = ''
  data.path = ''  # folder of the files; must be given unless downloaded
  data.tfds_dir = ''  # of what is prepared; '' is TFDS's own
  data.seed = 0  # of splits and of who is unseen
  return data


def tldr_data() -> ConfigDict:
  """TL;DR summaries; ten seen workers (METHOD section 4)."""
  data = _prepared_data()
  data.name = 'tldr'
  data.download = False  # whether the files may be fetched from openai
  data.labels = 'length'  # or 'human', the workers' own
  # 'plain': post and summary as they are, PAL-A reads the summary alone;
  # 'paper': 'Human: POST Assistant: SUMMARY<|endoftext|>', for encoders that
  # read a thousand tokens.
  data.template = 'plain'
  data.validation_fraction = 0.1  # share of each seen worker's training rows
  data.min_rows = 100  # validation rows of an unseen worker, at least
  data.max_support = 100  # of them, those it may adapt from
  data.min_query = 20  # of them, those it is tested on, at least
  # Ids of those who prefer the shorter summary; (): three in ten, by rank.
  data.short_workers = ()
  return data


def pickapic_data() -> ConfigDict:
  """Pick-a-Pic: pairs of images made for a prompt (METHOD section 4)."""
  data = _prepared_data()
  data.name = 'pickapic'
  data.version = 'v1'  # or 'v2'
  # 'all', or of v2 'overlap' and 'no_overlap': with the training table of v1,
  # which PickScore learnt from.
  data.test_rows = 'all'
  # Share of the users with enough rows, met only after training.
  data.unseen_fraction = 0.02
  data.min_support = 20  # training rows of an unseen user, at least
  data.max_support = 20  # of them, those it may adapt from
  data.min_query = 1  # test rows of an unseen user, at least
  return data


def pick_a_filter_data() -> ConfigDict:
  """Pick-a-Pic v1 with images in blue and red (METHOD section 4)."""
  data = pickapic_data()
  del data.version
  data.name = 'pick_a_filter'
  data.beta = 1.0  # share of the pairs that have a filtered image
  return data


def model() -> ConfigDict:
  """Variants of the model (METHOD section 1)."""
  config = ConfigDict()
  config.name = 'pal_a'  # 'pal_a', 'pal_b'
  config.point = 'Pw'  # PAL-A: 'Pw', 'f(P)w', 'f(Pw)', '|f(P)|w'
  # 'squared_distance', 'distance', 'normalized_distance', 'cosine',
  # 'inner_product'.
  config.preference = 'squared_distance'
  config.membership = 'convex'  # 'convex', 'partition', 'mixture_likelihood'
  config.mixture_level = 'comparison'  # or 'user'; of mixture_likelihood
  config.gumbel = False  # partition: straight-through samples in training
  config.gumbel_temperature = 1.0
  config.num_prototypes = 4  # K
  config.width = 64  # P
  config.projector = 'mlp2'  # 'identity' or 'mlpN', N hidden layers
  config.activation = 'gelu'  # 'relu', 'gelu', 'linear'
  config.dropout = 0.5
  config.residual = False  # adds the input to the output; needs D = P
  config.batch_norm = False
  config.use_bias = True
  # Of the projectors' products: 'float32', or 'bfloat16', which accelerators
  # multiply faster. Parameters, distances and losses stay float32.
  config.compute_dtype = 'float32'
  config.learn_scale = True  # whether tau, which multiplies rewards, learns
  config.init_user_scale = 0.1  # standard deviation of the users' logits
  config.matryoshka = ()  # nested prefixes of P, for example (8, 16, 32)
  return config


def features() -> ConfigDict:
  """How texts become arrays."""
  config = ConfigDict()
  config.encoder = 'minilm'  # 'minilm', 'huggingface', 'precomputed'
  config.path = ''  # model folder or name; '' is the encoder's default
  config.pooling = 'mean'  # 'mean', 'last', 'cls'
  config.layer = -1  # -1 last, -2 penultimate
  config.batch_size = 64
  config.cache_dir = ''  # '' is $XDG_CACHE_HOME/pal_jax/features
  config.dtype = 'float16'  # on disk
  config.normalize = 'rms'  # each text to a mean square of 1, or 'none'
  # Where they lie while a run trains: 'device', whole on each; 'host', on disk
  # if their encoder left them in a file, and every batch brings its own; or
  # 'auto', on the devices if they take at most half of what is free there.
  config.placement = 'auto'
  return config


def train() -> ConfigDict:
  config = ConfigDict()
  config.num_steps = 1000
  config.batch_size = 512  # comparisons, over all devices
  # 'comparisons', or 'users': whole users, as the user-level mixture needs.
  config.batching = 'comparisons'
  config.loss = 'logistic'  # 'cross_entropy', 'hinge', 'smoothed_hinge'
  config.user_weighting = 'none'  # or 'inverse_count', 1 / n_i
  config.bound_weight = 0.0  # lambda of relu(||u|| - beta); the paper has 1
  config.bound_radius = 4.0  # beta
  # Share of examples whose user is replaced by the population, so that people
  # the model knows nothing of (n = 0) are served well. Where people mostly
  # agree 0.05 gains half a point there; on a small corpus it loses more than a
  # point for everybody else.
  config.population_rate = 0.0
  # Whether a step reads and writes the rows of its batch's users alone, for
  # tables of many thousands: Adam is then the lazy one (`pal_jax.user_rows`).
  config.sparse_users = False
  config.shard_users = False  # splits the user table over the devices; jit
  # Users at first: 'random' (model.init_user_scale), or 'spectral', in K
  # clusters by the mean of their signed feature differences.
  config.start = 'random'
  # Users' weights: 'adam', as all else, or 'alternating', where every
  # `solve_every` steps all of them are also solved for exactly, the network
  # held still, from all their training comparisons. (With
  # model.mixture_level='user' there are none to solve for.)
  config.user_solver = 'adam'
  config.solve_every = 20  # steps
  config.solve_strength = 1.0  # lambda of KL(w || population), nats
  config.log_every = 50  # steps
  config.checkpoint_every = 100  # steps; validates and saves
  config.select = 'best'  # parameters reported: 'best' by validation, 'last'
  return config


def optimizer() -> ConfigDict:
  """Groups of parameters by name, each with its own rate and decay."""
  config = ConfigDict()
  config.name = 'adamw'  # or 'adam', whose decay is in the gradient (torch's)
  config.schedule = 'cosine'  # 'constant', 'linear', 'cosine'; to 0 at the end
  config.warmup_steps = 50
  config.clip_norm = 1.0  # global norm of the gradient; 0.0 turns it off
  config.b1 = 0.9
  config.b2 = 0.999
  config.eps = 1e-8
  # pattern: a regular expression searched in 'projector/Dense_0/kernel'.
  # optional: it may match nothing (otherwise that is an error).
  config.groups = ConfigDict(
    {
      'projectors': {
        'pattern': '^(projector|prompt_projectors)/',
        'learning_rate': 3e-4,
        'weight_decay': 0.01,
        'optional': False,
      },
      'points': {
        'pattern': '^(prototypes|user_logits|class_logits)$',
        'learning_rate': 0.1,
        'weight_decay': 0.0,
        'optional': False,
      },
      'temperatures': {
        'pattern': '^(log_scale|log_temperature)$',
        'learning_rate': 1e-2,
        'weight_decay': 0.0,
        'optional': False,
      },
    }
  )
  return config


def reference_optimizer() -> ConfigDict:
  """The reference implementation's: Adam, a rate a group (METHOD section 2)."""
  config = optimizer()
  config.name = 'adam'
  config.schedule = 'constant'
  config.warmup_steps = 0
  config.clip_norm = 0.0
  config.groups.projectors.learning_rate = 1e-4
  config.groups.points.learning_rate = 5e-3
  config.groups.temperatures.learning_rate = 0.1
  return config


def adaptation() -> ConfigDict:
  """Fitting the weights of users the model never saw (METHOD section 3)."""
  config = ConfigDict()
  # 'posterior': over the atoms of a discrete prior, in closed form; 'map': the
  # point estimate, KL-regularised towards the population, with a certificate.
  config.method = 'posterior'
  # Strength lambda of KL(w || population), in nats; 0.0 picks the best of a
  # grid on the seen users' validation comparisons.
  config.strength = 0.0
  config.max_iterations = 500  # of the solver of 'map'
  config.tolerance = 1e-5  # of the certificate, relative to max(1, objective)
  return config


def evaluation() -> ConfigDict:
  config = ConfigDict()
  config.num_support = (0, 1, 2, 5, 10, 20, 50)  # n of the few-shot curve
  config.resamples = 5  # random orders of each unseen user's support
  return config


def get_config() -> ConfigDict:
  """The base of every experiment."""
  config = ConfigDict()
  config.seed = 0  # of initialisation, batches and resamples
  config.parallel = 'jit'  # 'jit' on a mesh of all devices, or 'pmap'
  config.data = persona_data()
  config.features = features()
  config.model = model()
  config.train = train()
  config.optimizer = optimizer()
  config.adaptation = adaptation()
  config.evaluation = evaluation()
  return config
