"""`python -m bcosify.cli`, which `accelerate launch -m bcosify.cli align ...` needs."""

from .main import main

raise SystemExit(main())
