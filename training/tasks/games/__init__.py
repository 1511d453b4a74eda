"""Games: what is played, each kind of them in a short file.

- `gym.GymGame`: a Gymnasium id, with one role, ``agent``.
- `pettingzoo.PettingZooGame`: all roles at once (parallel), or one after the other (AEC).
- `openspiel.OpenSpielGame`: turns, simultaneous moves, chance, legal acts.
- `text.TextTask`: one question, one answer, and what scores it: exact tasks, and `reasoning.ReasoningGym`'s.
- `messenger.Messenger`: one more role, which tells the others something, before any parallel game.
- `takeover.TakeOver`: one more role, which may act in another's place, beside any game.
- `oneof.OneOf`: several games as one.
- `team.Team`: a score of some roles, and rewards of another size, of any game.
- `deferred.Deferred`: a game that is made when it is needed.

Each makes what a closed table names, or Gymnasium's registry; no text leads to an import.
"""
