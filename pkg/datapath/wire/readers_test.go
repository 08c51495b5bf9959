package wire

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestSeveralReaders: of several readers each has the ESP of its SPIs, the first what is
// no ESP or is in fragments, and nobody anything twice, whatever the divert set.
func TestSeveralReaders(t *testing.T) {
	l := newLab(t)
	const n = 3
	w, err := Open("e0", Options{Readers: n})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	readers := append([]PacketReader{w}, w.MoreReaders()...)
	if len(readers) != n {
		t.Fatalf("%d readers, want %d", len(readers), n)
	}
	type got struct {
		reader int
		mark   byte
	}
	came := make(chan got, 256)
	for k, r := range readers {
		go func() {
			ps := make([]Packet, 8)
			for {
				for i := range ps {
					ps[i] = Packet{Buf: make([]byte, 2000), Off: ReadHeadroom}
				}
				m, err := r.ReadBatch(ps)
				if err != nil {
					return
				}
				for _, p := range ps[:m] {
					came <- got{k, p.Buf[p.Off+p.Len-1]}
				}
			}
		}()
	}
	send := l.rawPeer()
	mark := byte(0)
	want := map[byte]int{}
	packet := func(v6 bool, proto uint8, spi uint32, fragment bool, reader int) {
		mark++
		body := make([]byte, 64)
		binary.BigEndian.PutUint32(body, spi)
		body[63] = mark
		var p []byte
		if v6 {
			p = ipPacket("fd09::3", "fd09::1", proto, body)
		} else {
			p = ipPacket("10.9.0.3", "10.9.0.1", proto, body)
			if fragment {
				p[6] = 0x20
			}
		}
		want[mark] = reader
		send(p)
	}
	all := func(step string) {
		t.Helper()
		for _, v6 := range []bool{false, true} {
			for spi := uint32(1000); spi < 1012; spi++ {
				packet(v6, 50, spi, false, int(spi%n))
			}
			packet(v6, 51, 1001, false, 0)
		}
		packet(false, 50, 1001, true, 0)
		for len(want) > 0 {
			select {
			case g := <-came:
				if r, ok := want[g.mark]; !ok || r != g.reader {
					t.Errorf("%s: packet %d at reader %d, want %d, %v", step, g.mark, g.reader, r, ok)
				}
				delete(want, g.mark)
			case <-time.After(time.Minute):
				t.Fatalf("%s: missing %v", step, want)
			}
		}
	}
	all("at first")
	if err := w.SetDivert([]netip.Prefix{netip.MustParsePrefix("10.7.0.0/16")}, nil); err != nil {
		t.Fatal(err)
	}
	all("diverting")
	select {
	case g := <-came:
		t.Errorf("twice: %+v", g)
	case <-time.After(50 * time.Millisecond):
	}
	if s := w.Stats(); s.Read != 2*27 {
		t.Errorf("%d read, want %d", s.Read, 2*27)
	}
}

// TestReadersRefused: where there can be only one it has everything.
func TestReadersRefused(t *testing.T) {
	l := newLab(t)
	w, err := Open("e0", Options{Readers: 3, refuse: func(path string) error {
		if path == "AF_PACKET" {
			return unix.ENOMEM
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if n := len(w.MoreReaders()); n != 0 {
		t.Fatalf("%d readers beside the first", n)
	}
	if f := <-w.Fallbacks(); f.Path != "AF_PACKET" {
		t.Errorf("fell back from %s", f.Path)
	}
	send := l.rawPeer()
	ps := []Packet{{Buf: make([]byte, 2000), Off: ReadHeadroom}}
	for spi := range byte(3) {
		send(ipPacket("10.9.0.3", "10.9.0.1", 50, []byte{0, 0, 1, spi, 0, 0, 0, 0}))
		if n, err := w.ReadBatch(ps); n != 1 || err != nil {
			t.Fatalf("got %d, %v", n, err)
		}
	}
}
