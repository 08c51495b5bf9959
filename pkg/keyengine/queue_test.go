package keyengine

import (
	"syscall"
	"testing"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// A queue asks for an SA of its own beside that for any; the two do not answer
// each other's ACQUIREs.
func TestAcquireQueue(t *testing.T) {
	testRig(t, func(r *rig) {
		r.o.Queues = 2
		e, k := r.policy(tunnel(ipsec.LevelUnique, 7))
		p := outSA(0x1000, 7)
		p.PerQueue = true
		r.mustAdd(p)
		k.Queue = 2
		r.NeedSA(e, k, flow)
		r.NeedSA(e, k, flow)
		r.want("acquire 192.0.2.1->198.51.100.2 reqid 7")
		if a := r.acquires[0]; a.Queue != 2 {
			t.Errorf("ACQUIRE for queue %d, want 2", a.Queue)
		}
		r.mustAdd(outSA(0x1001, 7)) // for any
		if r.Stats().Acquires != 1 {
			t.Error("an SA for any queue has answered for one")
		}
		q := outSA(0x1002, 7)
		q.Queue = 2
		if i, err := r.add(q, r.acquires[0].Seq); err != nil || i.Queue != 2 {
			t.Fatalf("got %+v, %v", i, err)
		}
		if r.Stats().Acquires != 0 {
			t.Error("the ACQUIRE is not answered")
		}
		if sa := r.o.SAD.Out(k, nil); sa == nil || sa.P.SPI != 0x1002 {
			t.Errorf("queue 2 sends on %v", sa)
		}
	})
}

// SPIs for a queue are those that the data path hands to its worker.
func TestQueueSPI(t *testing.T) {
	testRig(t, func(r *rig) {
		r.o.Queues = 3
		if got := r.Supported().Queues; got != 3 {
			t.Errorf("tells of %d queues, want 3", got)
		}
		g := keysock.GetSPI{Proto: ipsec.ESP, Src: outSA(1, 1).Dst, Dst: outSA(1, 1).Src, Mode: ipsec.Tunnel}
		get := func() *keysock.SAInfo {
			t.Helper()
			i, err := r.GetSPI(g)
			if err != nil {
				t.Fatal(err)
			}
			return i
		}
		r.do(func() {
			for n := range 60 {
				g.Queue = ipsec.Queue(n%3 + 1)
				if i := get(); int(i.SPI)%3 != n%3 || i.Queue != g.Queue || i.SPI < ipsec.MinSPI {
					t.Errorf("SPI %v of queue %d for queue %d", i.SPI, i.Queue, g.Queue)
				}
			}
			g.Queue, g.Min, g.Max = 2, 0x1000, 0x1000+20
			for range 7 { // as many as the range has: 0x1000 leaves 1
				if i := get(); i.SPI%3 != 1 || i.SPI < g.Min || i.SPI > g.Max {
					t.Errorf("SPI %v", i.SPI)
				}
			}
			_, err := r.GetSPI(g)
			r.errno(err, syscall.EEXIST)
			g.Min, g.Max = 0x2002, 0x2002 // chosen already, for another protocol
			if i := get(); i.SPI != 0x2002 {
				t.Errorf("SPI %v, want the only one", i.SPI)
			}
			g.Queue = 4
			_, err = r.GetSPI(g)
			r.errno(err, syscall.EINVAL)
		})
	})
}
