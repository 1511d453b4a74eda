"""Games: what is played, each kind of them in a short file.

=======================  =============================================================================================
`gym.GymGame`            a Gymnasium id: one role, ``agent``
`pettingzoo.PettingZooGame`  what its table names, all roles at once (parallel) or one after the other (AEC)
`openspiel.OpenSpielGame`    what its table names: turns, simultaneous moves, chance, legal acts
`text.TextTask`          one question, one answer, and whatever scores it: exact tasks, reasoning-gym
`messenger.Messenger`    one more role, that tells the others something, before any parallel game
`takeover.TakeOver`      one more role, that may act in another's place, beside any game
`oneof.OneOf`            several games as one
`team.Team`              a score of some roles, and rewards of another size, of any game
`deferred.Deferred`      a game that is made when it is needed
=======================  =============================================================================================

Each makes what a closed table or registry names; no text leads to an import.
"""
