"""TensorBoard and Weights & Biases, fed by whoever wants them: a follower on the user's side.

Neither the services nor the gateway know of them, so no API key and none of their packages goes
where training runs; a job that is over can be logged as well as one that goes on.
"""
