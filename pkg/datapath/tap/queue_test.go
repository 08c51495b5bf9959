package tap

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/packet"
)

// TestQueues: flows are spread over the queues, each of them stays on one, and
// moves to that on which its other direction is written.
func TestQueues(t *testing.T) {
	d := openTest(t, Options{MAC: testMAC, MTU: 1400, Queues: 2})
	qs := d.Queues()
	if len(qs) != 2 {
		t.Fatalf("%d queues, want 2", len(qs))
	}
	sh(t, fmt.Sprintf("ip addr add 198.51.100.1/24 dev %s && ip neigh add 198.51.100.2 lladdr 02:00:00:00:00:02 dev %[1]s", d.Name()))
	const flows, each = 32, 4
	var mu sync.Mutex
	at := map[uint16]map[int]int{} // packets by source port and queue
	got := make(chan struct{}, flows*each)
	read := func(k int) {
		fs := make([]Frame, 8)
		for i := range fs {
			fs[i] = Frame{Buf: make([]byte, 2048), Off: HeadroomMin}
		}
		for {
			n, err := qs[k].ReadBatch(fs)
			if err != nil {
				if !errors.Is(err, os.ErrClosed) {
					t.Errorf("queue %d: %v", k, err)
				}
				return
			}
			for _, f := range fs[:n] {
				var i packet.Info
				if !packet.Decode(f.Buf[f.Off+etherLen:f.Off+f.Len], &i) || i.DstPort != 9 {
					continue
				}
				mu.Lock()
				if at[i.SrcPort] == nil {
					at[i.SrcPort] = map[int]int{}
				}
				at[i.SrcPort][k]++
				mu.Unlock()
				got <- struct{}{}
			}
		}
	}
	var wg sync.WaitGroup
	for k := range qs {
		wg.Go(func() { read(k) })
	}
	defer wg.Wait()
	defer d.Close()
	defer d.Persist(false)
	conns := make([]*net.UDPConn, flows)
	send := func() {
		t.Helper()
		for range each {
			for _, c := range conns {
				if _, err := c.Write([]byte("queue")); err != nil {
					t.Fatal(err)
				}
			}
		}
		for range flows * each {
			select {
			case <-got:
			case <-time.After(time.Minute):
				t.Fatal("frames missing")
			}
		}
	}
	for i := range conns {
		c, err := net.DialUDP("udp4", nil, &net.UDPAddr{IP: net.IPv4(198, 51, 100, 2), Port: 9})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns[i] = c
	}
	send()
	used := map[int]bool{}
	for port, by := range at {
		if len(by) != 1 {
			t.Errorf("flow of port %d was on queues %v, want one", port, by)
		}
		for k := range by {
			used[k] = true
		}
	}
	if len(at) != flows || len(used) != 2 {
		t.Errorf("%d flows on %d queues, want %d on 2", len(at), len(used), flows)
	}

	// Answers on the second queue draw everything there.
	for _, c := range conns {
		b := udpFrame(t, uint16(c.LocalAddr().(*net.UDPAddr).Port))
		f := Frame{Buf: append(make([]byte, HeadroomMin), b...), Off: HeadroomMin, Len: len(b)}
		if _, err := qs[1].WriteBatch([]Frame{f}); err != nil {
			t.Fatal(err)
		}
	}
	mu.Lock()
	clear(at)
	mu.Unlock()
	send()
	for port, by := range at {
		if by[1] != each {
			t.Errorf("flow of port %d was on queues %v, want the second", port, by)
		}
	}
}

// udpFrame is an answer from 198.51.100.2 port 9.
func udpFrame(t *testing.T, port uint16) []byte {
	t.Helper()
	b := make([]byte, etherLen+28)
	copy(b, testMAC)
	copy(b[6:], []byte{2, 0, 0, 0, 0, 2, 8, 0})
	ip := b[etherLen:]
	copy(ip, []byte{0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, 17, 0, 0, 198, 51, 100, 2, 198, 51, 100, 1, 0, 9, byte(port >> 8), byte(port), 0, 8, 0, 0})
	packet.FixIPv4Checksum(ip)
	return b
}

// TestOneQueue: kernels without queues, devices of another kind, and a second
// process.
func TestOneQueue(t *testing.T) {
	t.Run("kernel without", func(t *testing.T) {
		all := addTAP
		defer func() { addTAP = all }()
		addTAP = func(l *netlink.Tuntap) error {
			if l.Flags&netlink.TUNTAP_MULTI_QUEUE != 0 {
				return fmt.Errorf("TUNSETIFF: %w", unix.EINVAL)
			}
			return all(l)
		}
		if n := len(openTest(t, Options{MAC: testMAC, Queues: 4}).Queues()); n != 1 {
			t.Errorf("%d queues, want 1", n)
		}
	})
	for _, mode := range []string{OffloadAuto, OffloadNone} {
		t.Run(mode, func(t *testing.T) {
			o := Options{MAC: testMAC, Queues: 3, Offload: mode, For: "queue" + mode}
			d := openTest(t, o)
			if n := len(d.Queues()); n != 3 {
				t.Fatalf("%d queues, want 3", n)
			}
			if _, err := Open(o); !errors.Is(err, ErrInUse) {
				t.Errorf("second open: got %v, want ErrInUse", err)
			}
			name := d.Name()
			for _, n := range []int{1, 2} { // of a device that was made with several
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				o.Queues = n
				if d = openTest(t, o); d.Name() != name || len(d.Queues()) != n {
					t.Errorf("adopted %s with %d queues, want %s with %d", d.Name(), len(d.Queues()), name, n)
				}
			}
			d.Persist(false)
			d.Close()
			o.Queues = 1
			d = openTest(t, o)
			d.Close()
			o.Queues = 2
			if d = openTest(t, o); len(d.Queues()) != 1 {
				t.Errorf("adopted with %d queues, want the 1 that it was made with", len(d.Queues()))
			}
		})
	}
	if _, err := Open(Options{Queues: MaxQueues + 1}); err == nil {
		t.Error("too many queues taken")
	}
}
