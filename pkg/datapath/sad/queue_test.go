package sad

import (
	"testing"

	"github.com/missiu/missiu/pkg/ipsec"
)

// TestOutQueue: a queue's own SA goes before one for any, that before none, and
// those of other queues never serve.
func TestOutQueue(t *testing.T) {
	d := NewDB()
	add := func(spi ipsec.SPI, q ipsec.Queue) *SA {
		p := params(spi, 7)
		p.Queue = q
		s := mustNew(t, p)
		if !d.Insert(s) {
			t.Fatalf("SA %v exists", spi)
		}
		return s
	}
	want := func(step string, by ...*SA) {
		t.Helper()
		for q, w := range by {
			for _, reqid := range []ipsec.ReqID{0, 7} {
				if got := d.Out(OutKey{ipsec.ESP, ipsec.Tunnel, reqid, src, dst, ipsec.Queue(q)}, nil); got != w {
					t.Errorf("%s: queue %d, reqid %d: got %v, want %v", step, q, reqid, got, w)
				}
			}
		}
	}
	want("none", nil, nil, nil)
	any := add(0x1000, 0)
	want("for any", any, any, any)
	two := add(0x1001, 2)
	want("second queue", any, any, two)
	one := add(0x1002, 1)
	want("both", any, one, two)
	d.SetState(two, Dying)
	want("dying", any, one, two)
	successor := add(0x1003, 2)
	want("successor", any, one, successor)
	d.Remove(two)
	d.Remove(successor)
	want("removed", any, one, any)
	d.Remove(any)
	want("only of one queue", nil, one, nil)
	d.Remove(one)
	if n := d.owned.Load(); n != 0 {
		t.Errorf("%d SAs counted", n)
	}
}
