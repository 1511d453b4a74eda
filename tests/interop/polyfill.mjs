// js-libp2p is written for Node 22, which has this of its own; with it, Node 20 runs js-libp2p too.
Promise.withResolvers ??= function () {
  const resolvers = {}
  resolvers.promise = new this((resolve, reject) => Object.assign(resolvers, { resolve, reject }))
  return resolvers
}
