// Package flow remembers for the packets of a flow what the SPD and the SAD say
// of them: a direct-mapped cache of fixed size in front of both, one to a worker
// of the data path (RFC 4301, 4.4.1: caching is for whole flows that one policy
// entry decides about).
//
// A flow is addresses, upper protocol and ports, or type and code of ICMP, of a
// packet that shows them. What does not (fragments, protocols without ports, headers
// that are cut) is not remembered and goes to the databases each time.
//
// Nothing is invalidated: both databases count their changes, a decision holds
// for the counts at which it was looked up, and any edit of either makes all
// decisions void at once. The counts are to be read before the look-up; the
// databases raise theirs after a change is in force. So a decision that was
// looked up while they changed is void, too.
package flow

import (
	"crypto/rand"
	"encoding/binary"
	"math/bits"
	"net/netip"

	"github.com/missiu/missiu/pkg/datapath/packet"
	"github.com/missiu/missiu/pkg/datapath/sad"
	"github.com/missiu/missiu/pkg/datapath/spd"
)

// DefaultSize is for a worker that carries traffic: 5.5 MiB, of which the kernel
// gives what is used.
const DefaultSize = 1 << 16

// Generation is the state of both databases: what was decided at one holds as
// long as it is still this one.
type Generation struct{ SPD, SAD uint64 }

// Decision is what was decided about a flow. Both are nil where no policy
// matches; SA is nil where the policy has none, or none of one transform alone.
type Decision struct {
	Policy *spd.Entry
	SA     *sad.SA // mature when it was remembered; look at its state
}

// Cache is for one goroutine. Create it with New.
type Cache struct {
	seed  [3]uint64
	swept Generation
	at    int // the next word of used that Sweep looks at; len(used): done
	slots []slot
	used  []uint64 // a bit for each slot, 1: there is something in it
}

type slot struct {
	gen      Generation
	src, dst netip.Addr
	ports    uint32
	proto    uint8
	class    uint8
	used     bool
	d        Decision
}

// New returns an empty Cache with size places, a power of two of at least 64.
// Two flows with one place take it from each other.
func New(size int) *Cache {
	if size < sweepStep || size&(size-1) != 0 {
		panic("flow: size is no power of two of at least 64")
	}
	c := &Cache{slots: make([]slot, size), used: make([]uint64, size/sweepStep)}
	c.at = len(c.used)
	var b [24]byte
	rand.Read(b[:])
	for k := range c.seed {
		c.seed[k] = binary.LittleEndian.Uint64(b[k*8:]) | 1
	}
	return c
}

// Whole reports whether a packet shows its flow.
func Whole(i *packet.Info) bool {
	return i.HasPorts && !i.IsFragment() && (packet.HasPortNumbers(i.Proto) || packet.IsICMP(i.Proto))
}

// slot returns the place of a flow. The hash is keyed, or senders could choose
// flows that take one place from each other.
func (c *Cache) slot(i *packet.Info, class uint8, ports uint32) int {
	h := c.mix(c.addr(i.Src), c.addr(i.Dst)^uint64(ports)<<16^uint64(i.Proto)<<8^uint64(class))
	return int(h & uint64(len(c.slots)-1))
}

func (c *Cache) mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a^c.seed[0], b^c.seed[1])
	return hi ^ lo
}

func (c *Cache) addr(a netip.Addr) uint64 {
	if a.Is4() {
		b := a.As4()
		return uint64(binary.LittleEndian.Uint32(b[:])) * c.seed[2]
	}
	b := a.As16()
	return c.mix(binary.LittleEndian.Uint64(b[:]), binary.LittleEndian.Uint64(b[8:])^c.seed[2])
}

// Get returns what was decided about the flow of i at g. class keeps flows apart
// that are alike and judged by different rules.
func (c *Cache) Get(i *packet.Info, class uint8, g Generation) (d Decision, ok bool) {
	if !Whole(i) {
		return d, false
	}
	ports := uint32(i.SrcPort)<<16 | uint32(i.DstPort)
	s := &c.slots[c.slot(i, class, ports)]
	if !s.used || s.gen != g || s.ports != ports || s.proto != i.Proto || s.class != class || s.src != i.Src || s.dst != i.Dst {
		return d, false
	}
	return s.d, true
}

// Put remembers d, which was looked up after g was read. It takes nothing of a
// packet that does not show its flow.
func (c *Cache) Put(i *packet.Info, class uint8, g Generation, d Decision) {
	if !Whole(i) {
		return
	}
	ports := uint32(i.SrcPort)<<16 | uint32(i.DstPort)
	k := c.slot(i, class, ports)
	c.used[k/sweepStep] |= 1 << (k % sweepStep)
	c.slots[k] = slot{
		gen: g, src: i.Src, dst: i.Dst, ports: ports, proto: i.Proto, class: class, used: true, d: d,
	}
}

// sweepStep is how many slots one call of Sweep is about, those of a word of used.
const sweepStep = 64

// Sweep forgets a few of the decisions that are void at g, so that policies and
// SAs that are gone, whose transforms hold keys, are not kept in memory by flows
// that have ended. It is called once a batch and costs nothing when all were
// looked at since g last changed, and otherwise little where there is nothing: most
// of the slots were never written, and a single packet is not to wait until the
// kernel has given memory for them.
func (c *Cache) Sweep(g Generation) {
	if c.swept != g {
		c.swept, c.at = g, 0
	}
	if c.at >= len(c.used) {
		return
	}
	for m := c.used[c.at]; m != 0; m &= m - 1 {
		bit := bits.TrailingZeros64(m)
		if s := &c.slots[c.at*sweepStep+bit]; s.gen != g {
			*s = slot{}
			c.used[c.at] &^= 1 << bit
		}
	}
	c.at++
}
