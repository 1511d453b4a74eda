// A js-libp2p node that is driven by its standard input: one command a line, one answer a line, both JSON.
//
// {"id": 1, "do": "start", "listen": […], "relay": false}  ->  {"id": 1, "ok": …}  or  {"id": 1, "error": "…"}
//
// It ends with its input. What it says to people goes to standard error (DEBUG=libp2p:* says everything).

import { randomBytes } from 'node:crypto'
import { createInterface } from 'node:readline'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { identify } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { noise } from '@libp2p/noise'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { CID } from 'multiformats/cid'

const ECHO = '/interop/echo/1.0.0'
const PING = '/ipfs/ping/1.0.0'
const TIMEOUT_MS = 20_000
// A circuit that a relay limits carries only what says that it may be carried so.
const LIMITED = { runOnLimitedConnection: true }

let node
const identified = new Map() // by peer id: what it said of itself
const routed = new Set() // peer ids: whom the DHT asks
const waiting = [] // {isTrue, resolve}: for what becomes true when libp2p tells of something

function until (isTrue) {
  return new Promise(resolve => {
    waiting.push({ isTrue, resolve })
    lookAgain()
  })
}

function lookAgain () {
  for (const entry of [...waiting]) {
    if (entry.isTrue()) {
      waiting.splice(waiting.indexOf(entry), 1)
      entry.resolve()
    }
  }
}

function inTime (promise) {
  let timer
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`not within ${TIMEOUT_MS} ms`)), TIMEOUT_MS)
  })
  return Promise.race([promise, late]).finally(() => clearTimeout(timer))
}

const bytes = text => new TextEncoder().encode(text)
const deadline = () => AbortSignal.timeout(TIMEOUT_MS)
const connectionsTo = peer => node.getConnections().filter(known => known.remotePeer.toString() === peer)
// Connections that still stand, of the kind that an address leads to.
const standing = address => connectionsTo(address.split('/').pop())
  .filter(known => known.status === 'open' && (known.limits != null) === address.includes('/p2p-circuit'))
const describe = ({ id, multiaddrs }) => ({ peer_id: id.toString(), addresses: multiaddrs.map(String) })

function connectionFacts (connection) {
  return {
    peer_id: connection.remotePeer.toString(),
    address: connection.remoteAddr.toString(),
    direction: connection.direction,
    encryption: connection.encryption,
    multiplexer: connection.multiplexer,
    limited: connection.limits != null
  }
}

// A circuit that stands is used. Asked to dial an address again, libp2p opens another circuit, takes it for a duplicate
// and drops it, and who dials in the meantime is given the one that was dropped.
async function openStream (address, protocol) {
  const [connection] = standing(address)
  const options = { ...LIMITED, signal: deadline() }
  return await (connection?.newStream(protocol, options) ?? node.dialProtocol(multiaddr(address), protocol, options))
}

async function answerTo (stream, question) {
  const answer = []
  const answered = (async () => { for await (const data of stream) answer.push(data.subarray()) })()
  stream.send(question)
  await stream.close()
  await answered
  return Buffer.concat(answer)
}

async function echo (stream) {
  try {
    for await (const data of stream) {
      if (!stream.send(data)) await new Promise(resolve => stream.addEventListener('drain', resolve, { once: true }))
    }
    await stream.close()
  } catch (error) {
    process.stderr.write(`echo: ${error}\n`)
  }
}

const commands = {
  async start ({ listen, relay }) {
    node = await createLibp2p({
      addresses: { listen },
      transports: [tcp(), circuitRelayTransport()],
      connectionEncrypters: [noise()],
      streamMuxers: [yamux()],
      services: {
        identify: identify(LIMITED),
        ping: ping({ ...LIMITED, maxOutboundStreams: 4 }), // the stream of one ping may still be closing when the next begins
        // Left to itself, it would serve nobody, and learn no address, that is not public.
        dht: kadDHT({
          clientMode: false,
          peerInfoMapper: passthroughMapper,
          allowQueryWithZeroPeers: true,
          validators: { interop: async () => {} },
          selectors: { interop: () => 0 }
        }),
        ...(relay ? { relay: circuitRelayServer() } : {})
      }
    })
    node.addEventListener('peer:identify', ({ detail }) => {
      identified.set(detail.peerId.toString(), detail)
      lookAgain()
    })
    node.services.dht.routingTable.addEventListener('peer:add', ({ detail }) => {
      routed.add(detail.toString())
      lookAgain()
    })
    for (const name of ['connection:open', 'connection:close', 'self:peer:update']) {
      node.addEventListener(name, lookAgain)
    }
    await node.handle(ECHO, echo, LIMITED)
    await until(() => !listen.some(address => address.endsWith('/p2p-circuit')) ||
      node.getMultiaddrs().some(address => address.toString().includes('/p2p-circuit')))
    return { peer_id: node.peerId.toString(), addresses: node.getMultiaddrs().map(String) }
  },

  async dial ({ address }) {
    return connectionFacts(await node.dial(multiaddr(address), { signal: deadline() }))
  },

  async refused ({ address }) {
    try {
      await node.dial(multiaddr(address), { signal: deadline() })
    } catch (error) {
      return { reason: [error, ...(error.errors ?? [])].map(String).join('; ') }
    }
    throw new Error(`${address} can be dialed`)
  },

  async connected ({ peer }) {
    await until(() => connectionsTo(peer).length > 0)
    return connectionFacts(connectionsTo(peer)[0])
  },

  async disconnected ({ peer }) {
    await until(() => connectionsTo(peer).length === 0)
    return {}
  },

  async identified ({ peer }) {
    await until(() => identified.has(peer))
    const { agentVersion, protocolVersion, protocols, listenAddrs, observedAddr } = identified.get(peer)
    return {
      agent: agentVersion,
      protocol_version: protocolVersion,
      protocols,
      listen_addresses: listenAddrs.map(String),
      observed_address: observedAddr?.toString()
    }
  },

  async routed ({ peer }) {
    await until(() => routed.has(peer))
    return {}
  },

  async ping ({ address }) {
    if (!address.includes('/p2p-circuit')) {
      return { rtt_ms: await node.services.ping.ping(multiaddr(address), { signal: deadline() }) }
    }
    const [question, began] = [randomBytes(32), performance.now()]
    const answer = await answerTo(await openStream(address, PING), question)
    if (!answer.equals(question)) throw new Error('a ping was answered with something else')
    return { rtt_ms: performance.now() - began }
  },

  async echo ({ address, text }) {
    return { text: (await answerTo(await openStream(address, ECHO), bytes(text))).toString() }
  },

  async find_peer ({ peer }) {
    return describe(await node.peerRouting.findPeer(peerIdFromString(peer), { signal: deadline() }))
  },

  async provide ({ cid }) {
    await node.contentRouting.provide(CID.parse(cid), { signal: deadline() })
    return {}
  },

  async find_providers ({ cid }) {
    const providers = []
    for await (const found of node.contentRouting.findProviders(CID.parse(cid), { signal: deadline() })) {
      providers.push(describe(found))
    }
    return { providers }
  },

  async put ({ key, value }) {
    let taken = 0
    for await (const event of node.services.dht.put(bytes(key), bytes(value), { signal: deadline() })) {
      if (event.name === 'PEER_RESPONSE' && event.messageName === 'PUT_VALUE') taken++
    }
    return { taken }
  },

  async get ({ key }) {
    for await (const event of node.services.dht.get(bytes(key), { signal: deadline() })) {
      if (event.name === 'VALUE') return { value: Buffer.from(event.value).toString(), from: event.from.toString() }
    }
    throw new Error(`nobody has ${key}`)
  }
}

const lines = createInterface({ input: process.stdin })
lines.on('line', async line => {
  const { id, do: name, ...given } = JSON.parse(line)
  let answer
  try {
    answer = { id, ok: await inTime(commands[name](given)) }
  } catch (error) {
    answer = { id, error: `${error.name}: ${error.message}`, stack: error.stack }
  }
  process.stdout.write(JSON.stringify(answer) + '\n')
})
lines.on('close', async () => {
  await node?.stop()
  process.exit(0)
})
