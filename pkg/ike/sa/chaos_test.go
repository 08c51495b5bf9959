package sa

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
)

// bytesSource is a source of random numbers that a fuzzer writes; at its end
// nothing happens any more.
type bytesSource struct{ b []byte }

func (s *bytesSource) Uint64() uint64 {
	if len(s.b) == 0 {
		return ^uint64(0)
	}
	v := uint64(s.b[0])
	s.b = s.b[1:]
	return v * 0x0101010101010101
}

// chaos is two sides that want something of each other all the time, over a
// network that loses, duplicates and delays; and points of quiet, at which they
// must agree.
type chaos struct {
	*lab
	r      *rand.Rand
	rekeys bool // nothing but rekeying: as many child SAs as there were
	was    int
	moves  bool // a's addresses come and go
}

// live makes the lineage, again if there was one.
func (c *chaos) live() {
	c.t.Helper()
	if c.a.sa != nil {
		c.step(c.now.Add(linger + 1)) // the last responses
		for _, n := range []*node{c.a, c.b} {
			if !n.sa.done || len(n.sads)+len(n.larval)+len(n.spis) != 0 || len(told[Failed](n)) != 1 {
				c.t.Fatalf("%s has not ended: %s, larval %v, SPIs %v, Failed %v", n.name, n.describe(), n.larval, n.spis, told[Failed](n))
			}
		}
	}
	c.wire, c.held = nil, nil
	c.clearEvents()
	c.a.sa = NewInitiator(c.a.cfg, c.a.rule)
	c.a.do(c.a.sa.Start(c.now, reqA(1), reqA(2)))
	c.settle()
	c.was = 2
	c.want(2)
}

func newChaos(t testing.TB, r *rand.Rand) *chaos {
	c := &chaos{lab: newLab(t), r: r}
	if r.IntN(4) != 0 {
		c.plain()
	}
	if r.IntN(4) == 0 {
		c.hybrid()
	}
	c.rekeys = r.IntN(2) == 0
	if c.moves = r.IntN(4) == 0; c.moves {
		mobikeLab(c.lab)
	}
	c.a.policies = []Policy{reqA(0).Policy}
	for _, n := range []*node{c.a, c.b} {
		n.rule.DPD = 20 * time.Second
	}
	c.live()
	c.chance = r
	return c
}

// act has n want something.
func (c *chaos) act(n *node) {
	n.holdSPI = c.r.IntN(6) == 0
	if !n.holdSPI {
		n.giveSPIs()
	}
	var x *child
	if len(n.sa.children) > 0 {
		x = n.sa.children[c.r.IntN(len(n.sa.children))]
	}
	if c.moves && c.r.IntN(4) == 0 {
		all := [][]netip.Addr{{a1}, {a2}, {a1, a2}}
		c.a.do(c.a.sa.SetAddresses(c.now, all[c.r.IntN(3)]))
	}
	switch k := c.r.IntN(16); {
	case k < 4:
		n.do(n.sa.Rekey(c.now))
	case k < 9 && x != nil:
		n.expire(x, false)
	case k < 10:
		_, outs := n.sa.RekeyChildren(c.now)
		n.do(outs)
	case c.rekeys:
	case k < 12 && len(n.sa.children) < 8:
		n.add()
	case k < 14 && x != nil:
		n.expire(x, true)
	case k == 14 && x != nil:
		n.do(n.sa.ChildLost(c.now, ipsec.SAID{Proto: x.proto, Dst: x.outDst, SPI: x.outSPI}, errFlushed))
	case k == 15 && c.r.IntN(4) == 0:
		n.do(n.sa.Delete(c.now))
	}
}

var errFlushed = fmt.Errorf("flushed")

// quiet lets everything come to its end, and looks.
func (c *chaos) quiet() {
	c.t.Helper()
	c.chance = nil
	for _, n := range []*node{c.a, c.b} {
		n.holdSPI = false
		n.giveSPIs()
	}
	c.settle()
	c.step(c.now.Add(staleAfter + linger + 1))
	if c.a.sa.failed || c.b.sa.failed {
		c.step(c.now.Add(5 * time.Minute)) // the other finds out
		c.live()
	}
	c.settle()
	c.want(len(c.a.sa.children))
	if c.rekeys && len(c.a.sa.children) != c.was {
		c.t.Errorf("%d child SAs after nothing but rekeying, want %d", len(c.a.sa.children), c.was)
	}
	c.was = len(c.a.sa.children)
	c.chance = c.r
}

func (c *chaos) run(steps int) {
	c.t.Helper()
	for range steps {
		n := c.a
		if c.r.IntN(2) == 0 {
			n = c.b
		}
		if n.sa.failed || c.r.IntN(24) == 0 {
			c.quiet()
			if c.t.Failed() {
				return
			}
		}
		c.act(n)
		if len(c.a.sa.ikes) > maxIKESAs+1 || len(c.b.sa.ikes) > maxIKESAs+1 {
			c.t.Fatalf("IKE SAs: a %s, b %s", c.a.describe(), c.b.describe())
		}
		if c.r.IntN(2) == 0 {
			c.step(c.now.Add(time.Duration(c.r.IntN(1500)) * time.Millisecond))
		}
	}
	c.quiet()
}

// TestChaos is long random lives. SA_SEEDS makes them more.
func TestChaos(t *testing.T) {
	n := 150
	if testing.Short() {
		n = 20
	}
	if v, err := strconv.Atoi(os.Getenv("SA_SEEDS")); err == nil {
		n = v
	}
	for seed := range n {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			newChaos(t, rand.New(rand.NewPCG(uint64(seed), 11))).run(100)
		})
	}
}

// FuzzChaos has the fuzzer write the life.
func FuzzChaos(f *testing.F) {
	for seed := range byte(6) {
		b := make([]byte, 300)
		_, _ = rand.NewChaCha8([32]byte{seed}).Read(b)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		newChaos(t, rand.New(&bytesSource{b})).run(min(len(b)/8, 60))
	})
}
