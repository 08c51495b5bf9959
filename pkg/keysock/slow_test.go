package keysock

import (
	"errors"
	"io"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

func (r *rig) fill(n int) {
	r.inServer(func() {
		for k := range n {
			p := params(ipsec.SPI(0x1000 + k))
			p.SrcTS, p.DstTS = nil, nil
			r.b.sas = append(r.b.sas, &SAInfo{SAParams: *p, State: Mature, Added: epoch})
		}
	})
}

func TestDumpNumbering(t *testing.T) {
	r := start(t, ServerOptions{})
	r.fill(3)
	x := r.stranger()
	x.send(&pfkey.Message{Header: pfkey.Header{Type: pfkey.Dump, Seq: 77, Pid: 5}})
	for _, seq := range []uint32{1, 2, 0} {
		m := x.want(pfkey.Header{Type: pfkey.Dump, SAType: 3, Seq: seq, Pid: 5})
		if m.EncrKey == nil || m.AuthKey == nil || m.SA2 == nil || m.Hard == nil || m.Current == nil || m.SAMore != nil {
			t.Errorf("got %v", m)
		}
	}
	r.inServer(func() { r.b.sas[1].Dst = addr("203.0.113.1") })
	f := &pfkey.Filter{Dst: [16]byte{203, 0, 113, 9}, Family: 2, DstPrefix: 24}
	x.send(&pfkey.Message{Header: pfkey.Header{Type: pfkey.Dump, Pid: 5}, Filter: f})
	if m := x.want(pfkey.Header{Type: pfkey.Dump, SAType: 3, Pid: 5}); m.SA.SPI != 0x1001 {
		t.Errorf("filtered: got %v", m)
	}
	f.Dst[0] = 1
	x.ask(&pfkey.Message{Header: pfkey.Header{Type: pfkey.Dump, Pid: 5}, Filter: f}, 2)
	x.quiet()
}

// A dump of 100,000 SAs waits for its reader, which may ask other things
// meanwhile, and holds up nobody. What goes away meanwhile is not in it, what is
// there from beginning to end is, and it has its end.
func TestBigDump(t *testing.T) {
	const n = 100_000
	r := start(t, ServerOptions{})
	r.fill(n)
	x, other, ctx := r.stranger(), r.dial(), r.ctx()
	x.send(&pfkey.Message{Header: pfkey.Header{Type: pfkey.Dump, Pid: 5}})
	if m := x.recv(); m.Seq != 1 {
		t.Fatalf("got %v, want seq 1", m)
	}
	// x stops reading here.
	r.inServer(func() { r.b.sas = r.b.sas[:n-100] })
	wantErr(t, "Add by another", other.Add(ctx, params(0x10), 0), syscall.EINVAL)
	wantErr(t, "Add by another", other.Add(ctx, params(0x1000+n), 0), nil)
	x.send(&pfkey.Message{Header: pfkey.Header{Type: pfkey.Dump, Seq: 9, Pid: 5}})
	x.send(&pfkey.Message{Header: pfkey.Header{Type: pfkey.XSPDDump, Seq: 10, Pid: 5}})
	next, busy, copies := uint32(2), 0, 0
	for {
		m := x.recv()
		switch {
		case m.Errno == uint8(syscall.EBUSY):
			busy++
			continue
		case m.Type != pfkey.Dump:
			copies++
			continue
		}
		if m.SA.SPI != 0x1000+uint32(next)-1 {
			t.Fatalf("seq %d: got SPI %#x, want %#x", m.Seq, m.SA.SPI, 0x1000+next-1)
		}
		if m.Seq == 0 {
			break
		}
		if m.Seq != next {
			t.Fatalf("got seq %d, want %d", m.Seq, next)
		}
		next++
	}
	// The entry that waited to know if it is the last was fetched before.
	if want := uint32(n - 100); next < want || next > want+1 || busy != 2 || copies != 1 {
		t.Errorf("got %d SAs, %d EBUSY, %d copies, want %d or one more, 2, 1", next, busy, copies, want)
	}
	// The next dump may begin.
	x.send(&pfkey.Message{Header: pfkey.Header{Type: pfkey.Dump, Pid: 5}})
	x.want(pfkey.Header{Type: pfkey.Dump, SAType: 3, Seq: 1, Pid: 5})
}

// Our client reads a big dump, too.
func TestClientBigDump(t *testing.T) {
	r := start(t, ServerOptions{})
	r.fill(20_000)
	c := r.dial()
	l, err := c.Dump(r.ctx(), ipsec.ESP)
	if err != nil || len(l) != 20_000 {
		t.Fatalf("Dump: got %d, %v", len(l), err)
	}
	_, err = c.Get(r.ctx(), l[19_999].SAID, netip.Addr{})
	wantErr(t, "Get", err, nil)
}

// Who does not read loses events and nothing else, and opted in is told how many
// and where.
func TestFullQueue(t *testing.T) {
	const n = 20_000
	r := start(t, ServerOptions{QueueLen: 10})
	x := r.stranger()
	x.ask(&pfkey.Message{
		Header: pfkey.Header{Type: pfkey.Register, SAType: 3}, OptIn: &pfkey.OptIn{Features: 1},
	}, 0)
	i := &SAInfo{SAParams: *params(0)}
	for k := range n {
		i.SPI = ipsec.SPI(k)
		r.s.Expire(i, true)
	}
	dropped := r.s.Stats().Dropped
	if dropped == 0 {
		t.Fatal("nothing was dropped")
	}
	seen, lost := uint32(0), uint64(0)
	for uint64(seen)+lost < n {
		m := x.recv()
		switch m.Type {
		case pfkey.Expire:
			if m.SA.SPI != seen+uint32(lost) {
				t.Fatalf("got SPI %d after %d seen and %d lost", m.SA.SPI, seen, lost)
			}
			seen++
		case pfkey.XLost:
			lost += m.Count.N
		}
	}
	if lost != dropped {
		t.Errorf("told of %d, dropped %d", lost, dropped)
	}
	x.quiet()
}

// A stranger that reads only when it asks (strongSwan's first socket) is not
// closed for the events that it leaves.
func TestUnreadEventsAreNoStall(t *testing.T) {
	r := start(t, ServerOptions{QueueLen: 10, StallLimit: 4 * time.Second})
	x, c := r.stranger(), r.dial()
	x.register()
	i := &SAInfo{SAParams: *params(0x1000)}
	for range 20_000 {
		r.s.Expire(i, true)
	}
	time.Sleep(4500 * time.Millisecond) // more than the limit
	wantErr(t, "Flush by another", c.Flush(r.ctx(), 0), nil)
	// It asks, and the answer is behind the events.
	x.send(&pfkey.Message{Header: pfkey.Header{Type: pfkey.XSPDFlush, Seq: 8, Pid: 9}})
	n := 0
	for m := x.recv(); m.Type != pfkey.XSPDFlush; m = x.recv() {
		n++
	}
	if n == 0 || n > 20_000-1 {
		t.Errorf("got %d events, want some", n)
	}
	if got := r.s.Stats().Stalled; got != 0 {
		t.Errorf("%d clients closed, want none", got)
	}
}

// Answers are never dropped: a client that asks without reading is not listened
// to until it reads, and gets each answer in order.
func TestAnswersAreNotDropped(t *testing.T) {
	r := start(t, ServerOptions{QueueLen: 1, Answers: 2})
	x := r.stranger()
	const n = 50_000
	sent := make(chan error, 1)
	go func() {
		x.nc.SetWriteDeadline(time.Now().Add(time.Minute))
		for k := range uint32(n) {
			b := pfkey.Header{Type: pfkey.XSPDFlush, Seq: k + 1, Pid: 1}.Append(nil)
			if _, err := x.nc.Write(b); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	// Far more than the buffers hold: some must be unread by the server.
	select {
	case err := <-sent:
		t.Fatalf("everything was sent before anything was read: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	for k := range uint32(n) {
		x.want(pfkey.Header{Type: pfkey.XSPDFlush, Seq: k + 1, Pid: 1})
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

// A client that never reads its answers is closed after the limit; others go on.
func TestStalledClientIsClosed(t *testing.T) {
	for _, what := range []string{"answers", "dump"} {
		r := start(t, ServerOptions{StallLimit: 300 * time.Millisecond})
		r.fill(20_000)
		x, c := r.stranger(), r.dial()
		if what == "dump" {
			x.send(&pfkey.Message{Header: pfkey.Header{Type: pfkey.Dump}})
		} else {
			x.nc.SetWriteDeadline(time.Now().Add(time.Minute))
			for k := 0; ; k++ {
				if _, err := x.nc.Write(pfkey.Header{Type: pfkey.XSPDFlush, Seq: uint32(k)}.Append(nil)); err != nil {
					if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
						break
					}
					t.Fatal(err)
				}
			}
		}
		for end := time.Now().Add(time.Minute); r.s.Stats().Stalled == 0; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: not closed", what)
			}
		}
		wantErr(t, "Flush by another", c.Flush(r.ctx(), 0), nil)
		// What was sent is there, then the end.
		x.nc.SetReadDeadline(time.Now().Add(time.Minute))
		b := make([]byte, maxMessage)
		for {
			if _, err := x.nc.Read(b); err != nil {
				if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%s: %v, want the end", what, err)
				}
				break
			}
		}
		r.stop()
	}
}

func TestConcurrentClients(t *testing.T) {
	r := start(t, ServerOptions{})
	ctx := r.ctx()
	var wg sync.WaitGroup
	for n := range 8 {
		c := r.dial()
		for k := range 4 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for j := range 25 {
					p := params(ipsec.SPI(0x1000 + n<<16 + k<<8 + j))
					// All with one seq, that of an ACQUIRE.
					if err := c.Add(ctx, p, 7); err != nil {
						t.Errorf("Add: %v", err)
					}
					i, err := c.Get(ctx, p.SAID, p.Src)
					if err != nil || i.SPI != p.SPI {
						t.Errorf("Get: got %+v, %v", i, err)
					}
					if err := c.Add(ctx, p, 7); !errors.Is(err, syscall.EEXIST) {
						t.Errorf("second Add: got %v", err)
					}
					if err := c.Delete(ctx, p.SAID, p.Src); err != nil {
						t.Errorf("Delete: %v", err)
					}
				}
			}()
		}
	}
	wg.Wait()
	var left int
	r.inServer(func() { left = len(r.b.sas) })
	if left != 0 {
		t.Errorf("%d SAs left", left)
	}
}

// The answers of a dump share datagrams where the client takes that, as many as
// fit; and events that overflow the queue meanwhile cost none of them, and are
// told.
func TestPackedDump(t *testing.T) {
	const n = 5000
	r := start(t, ServerOptions{QueueLen: 10})
	r.fill(n)
	x := r.stranger()
	x.send(&pfkey.Message{
		Header: pfkey.Header{Type: pfkey.Register, SAType: 3, Seq: 1}, OptIn: &pfkey.OptIn{Features: pfkey.FeaturePrivate | pfkey.FeaturePacks},
	})
	buf := make([]byte, maxMessage)
	datagrams, seq, lost, events := 0, uint32(0), uint64(0), uint64(0)
	read := func() (last bool) {
		x.nc.SetReadDeadline(time.Now().Add(time.Minute))
		k, err := x.nc.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if k > maxPack {
			t.Errorf("datagram of %d octets", k)
		}
		for rest := buf[:k]; rest != nil; {
			b, more := pfkey.Split(rest)
			if more == nil {
				b = rest
			}
			rest = more
			m, err := pfkey.Decode(b)
			if err != nil {
				t.Fatal(err)
			}
			switch m.Type {
			case pfkey.Dump:
				seq++
				if m.SA.SPI != 0x1000+seq-1 || m.Seq != seq && (m.Seq != 0 || seq != n) {
					t.Fatalf("answer %d has seq %d, SPI %#x", seq, m.Seq, m.SA.SPI)
				}
			case pfkey.Expire:
				events++
			case pfkey.XLost:
				lost += m.Count.N
			}
		}
		datagrams++
		return seq == n
	}
	read()
	x.send(&pfkey.Message{Header: pfkey.Header{Type: pfkey.Dump, Seq: 2}})
	read()
	const flood = 20_000
	i := &SAInfo{SAParams: *params(0)}
	for range flood {
		r.s.Expire(i, true)
	}
	for !read() {
	}
	for events+lost < flood {
		read()
	}
	if lost == 0 || lost+events != flood {
		t.Errorf("%d events, %d told as lost, want %d in all", events, lost, flood)
	}
	if datagrams > n/10 {
		t.Errorf("%d answers and %d events in %d datagrams", n, events, datagrams)
	}
}
