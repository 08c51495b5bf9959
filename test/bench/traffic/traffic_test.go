package traffic

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"
)

func datagram(run, seq uint64) []byte {
	b := make([]byte, 64)
	copy(b, Marker)
	binary.BigEndian.PutUint64(b[len(Marker):], run)
	binary.BigEndian.PutUint64(b[len(Marker)+8:], seq)
	return b
}

func TestCounter(t *testing.T) {
	var c udpCounter
	c.add(datagram(1, 0))
	c.add(datagram(2, 0))
	c.add(datagram(2, 1))
	c.add(datagram(1, 1))          // a straggler
	c.add(datagram(2, 2)[:40])     // cut
	c.add(make([]byte, headerLen)) // not ours
	if c.run.Load() != 2 || c.packets.Load() != 2 || c.octets.Load() != 128 {
		t.Errorf("run %d, %d packets, %d octets; want run 2, 2 packets, 128 octets", c.run.Load(), c.packets.Load(), c.octets.Load())
	}
}

// Over the loopback interface everything arrives, at the rate that was asked.
func TestUDP(t *testing.T) {
	fd, err := udpSocket(UDPPort)
	if err != nil {
		t.Skip("no UDP socket with a large buffer:", err)
	}
	a := &Agent{}
	go a.countUDP(fd)
	for run, to := range []string{"127.0.0.1", "::1"} {
		var sent UDPSent
		req := UDPSend{To: netip.MustParseAddr(to), Run: uint64(run + 1), Size: 64, Rate: 2000, Duration: 200 * time.Millisecond}
		for sent.Packets == 0 { // in vain on a machine that stood still
			if err := a.UDPSend(req, &sent); err != nil {
				t.Skip(err)
			}
		}
		var got UDPCount
		for end := time.Now().Add(time.Minute); got.Packets < sent.Packets && time.Now().Before(end); {
			a.UDPCount(req.Run, &got)
		}
		if got.Packets != sent.Packets || got.Octets != 64*sent.Packets {
			t.Errorf("%s: sent %d, received %+v", to, sent.Packets, got)
		}
		if most := uint64(sent.Elapsed.Seconds()*2000) + 1; sent.Packets > most {
			t.Errorf("%s: %d datagrams in %v at 2000 a second", to, sent.Packets, sent.Elapsed)
		}
	}
}

// Delays are of the latest flow alone.
func TestBeside(t *testing.T) {
	a := &Agent{}
	for _, d := range []struct {
		run   uint64
		delay time.Duration
	}{{1, 5 * time.Millisecond}, {2, 7 * time.Millisecond}, {1, 9 * time.Millisecond}, {2, 8 * time.Millisecond}} {
		a.beside.add(d.run, d.delay)
	}
	var old, all []float64
	a.Beside(1, &old)
	a.Beside(2, &all)
	if len(old) != 0 || !slices.Equal(all, []float64{0.007, 0.008}) {
		t.Errorf("%v and %v, want nothing, and 7 and 8 ms", old, all)
	}
}

// Over the loopback interface a flow's delays are known, and short.
func TestBesideFlow(t *testing.T) {
	fd, err := udpSocket(besidePort)
	if err != nil {
		t.Skip("no UDP socket with a large buffer:", err)
	}
	a := &Agent{}
	go a.beside.serve(fd)
	var sent int
	if err := a.BesideSend(BesideSend{To: netip.MustParseAddr("127.0.0.1"), Run: 1, Every: time.Millisecond, Duration: 50 * time.Millisecond}, &sent); err != nil {
		t.Skip(err)
	}
	var all []float64
	for end := time.Now().Add(10 * time.Second); len(all) < sent && time.Now().Before(end); time.Sleep(time.Millisecond) {
		a.Beside(1, &all)
	}
	if sent == 0 || len(all) != sent || slices.Min(all) < 0 || slices.Max(all) > 10 {
		t.Errorf("%d sent, delays %v", sent, all)
	}
}
