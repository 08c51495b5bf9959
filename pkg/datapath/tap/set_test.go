package tap

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/packet"
)

func openSet(t *testing.T, o Options) *Set {
	t.Helper()
	needRoot(t)
	o.MAC, o.MTU, o.For, o.ReadOffload, o.Up = testMAC, 1400, "mi-phys", true, true
	s, err := OpenSet(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close()
		if _, err := Remove("mi-phys"); err != nil {
			t.Error(err)
		}
	})
	return s
}

// addMembers gives s a member for each prefix, with an address and routes for tests.
func addMembers(t *testing.T, s *Set, prefixes ...string) (names []string) {
	t.Helper()
	for _, p := range prefixes {
		index, err := s.Add(netip.MustParsePrefix(p))
		if err != nil {
			t.Fatalf("%s: %v", p, err)
		}
		ifi, err := net.InterfaceByIndex(index)
		if err != nil {
			t.Fatalf("%s: %v", p, err)
		}
		names = append(names, ifi.Name)
	}
	return names
}

func received(t *testing.T, name string) int {
	t.Helper()
	n, err := strconv.Atoi(sh(t, "cat /sys/class/net/"+name+"/statistics/rx_packets"))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// to is a frame with a UDP packet to a.
func to(a string) Frame {
	dst := netip.MustParseAddr(a)
	b := make([]byte, 64+etherLen+48)
	ip := b[64+etherLen:]
	if dst.Is4() {
		copy(ip, []byte{0x45, 0, 0, 48, 0, 0, 0x40, 0, 64, 17, 0, 0, 203, 0, 113, 9})
		copy(ip[16:], dst.AsSlice())
		packet.FixIPv4Checksum(ip)
	} else {
		copy(ip, []byte{0x60, 0, 0, 0, 0, 8, 17, 64, 0x20, 1, 0x0d, 0xb8})
		copy(ip[24:], dst.AsSlice())
	}
	return Frame{Buf: b, Off: 64, Len: etherLen + 48}
}

// The members are one device with the first to readers and writers; each has what
// goes to its address.
func TestSet(t *testing.T) {
	for _, queues := range []int{1, 2} {
		t.Run(fmt.Sprint(queues, " queues"), func(t *testing.T) {
			s := openSet(t, Options{Queues: queues})
			names := append([]string{s.Name()}, addMembers(t, s, "10.9.0.1/32", "2001:db8:9::1/128")...)
			if again := addMembers(t, s, "10.9.0.1/32"); again[0] != names[1] {
				t.Errorf("the same address again: %s, want %s", again[0], names[1])
			}
			if m := s.Members(); len(m) != 2 || m[0].Name != names[1] || m[0].Address.String() != "10.9.0.1/32" || m[1].Name != names[2] || m[0].MTU != 1400 {
				t.Fatalf("members %+v, want %v", m, names[1:])
			}
			sh(t, "ip addr add 198.51.100.1/24 dev "+names[0]+"; ip route add 203.0.113.0/24 dev "+names[1]+"; ip -6 route add 2001:db8:7::/64 dev "+names[2])

			got := make(chan string, 64)
			done := make(chan error, queues)
			for _, q := range s.Queues() {
				go func() {
					fs := frames(4, 64)
					r := q.(interface { // as the engine reads
						TryBatch([]Frame) (int, error)
						Await() error
					})
					for {
						n, err := r.TryBatch(fs)
						if n == 0 && err == nil {
							err = r.Await()
						}
						if err != nil {
							done <- err
							return
						}
						for _, f := range fs[:n] {
							var i packet.Info
							if packet.Decode(f.Buf[f.Off+etherLen:f.Off+f.Len], &i) && i.DstPort == 9 {
								got <- i.Src.String() + " " + i.Dst.String()
							}
						}
					}
				}()
			}
			read := func(wants ...string) {
				t.Helper()
				for _, want := range wants {
					var src, dst string
					fmt.Sscan(want, &src, &dst)
					c, err := net.Dial("udp", net.JoinHostPort(dst, "9"))
					if err != nil {
						t.Fatal(err)
					}
					defer c.Close()
					if _, err := c.Write(make([]byte, 100)); err != nil {
						t.Fatal(err)
					}
					select {
					case g := <-got:
						if g != want {
							t.Errorf("read %s, want %s", g, want)
						}
					case <-time.After(time.Minute):
						t.Fatalf("no packet to %s", want)
					}
				}
			}
			read("198.51.100.1 198.51.100.2", "10.9.0.1 203.0.113.2", "2001:db8:9::1 2001:db8:7::2")

			was := make([]int, len(names))
			count := func(wants ...int) {
				t.Helper()
				for k, want := range wants {
					if n := received(t, names[k]) - was[k]; n != want {
						t.Errorf("%s got %d packets, want %d", names[k], n, want)
					}
					was[k] += want
				}
			}
			for k, n := range names {
				was[k] = received(t, n)
			}
			write := func(dsts ...string) {
				t.Helper()
				var fs []Frame
				for _, d := range dsts {
					fs = append(fs, to(d))
				}
				q := s.Queues()[queues-1]
				if n, err := q.WriteBatch(fs); n != len(fs) || err != nil {
					t.Fatalf("WriteBatch: %d, %v", n, err)
				}
			}
			write("10.9.0.1", "10.9.0.1", "198.51.100.1", "2001:db8:9::1", "10.9.0.1", "10.9.0.7", "2001:db8:9::7")
			count(3, 3, 1)
			fs := []Frame{to("10.9.0.1"), to("2001:db8:9::1"), to("198.51.100.1")}
			if n := testing.AllocsPerRun(9, func() { s.WriteBatch(fs) }); n != 0 {
				t.Errorf("WriteBatch: %v allocations, want 0", n)
			}
			count(10, 10, 10)

			if err := s.SetMTU(1300); err != nil || s.Members()[1].MTU != 1300 || sh(t, "cat /sys/class/net/"+names[1]+"/mtu") != "1300" {
				t.Errorf("mtu of all: %v, %+v", err, s.Members())
			}

			// One goes, under the readers' eyes; what comes for it is not lost on us.
			if err := s.Drop(netip.MustParseAddr("10.9.0.1")); err != nil {
				t.Fatal(err)
			}
			if err := s.Drop(netip.MustParseAddr("10.9.0.1")); !errors.Is(err, unix.ENOENT) {
				t.Errorf("dropped again: %v, want ENOENT", err)
			}
			if _, err := net.InterfaceByName(names[1]); err == nil {
				t.Errorf("%s is still there", names[1])
			}
			names[1] = names[2]
			was[1] = was[2]
			write("10.9.0.1", "2001:db8:9::1")
			count(1, 1)
			read("198.51.100.1 198.51.100.2", "2001:db8:9::1 2001:db8:7::2")

			s.Close()
			for range queues {
				select {
				case err := <-done:
					if !errors.Is(err, os.ErrClosed) {
						t.Errorf("reader ended with %v, want os.ErrClosed", err)
					}
				case <-time.After(time.Minute):
					t.Fatal("a reader goes on")
				}
			}
			if _, err := s.Add(netip.MustParsePrefix("10.9.0.2/32")); !errors.Is(err, os.ErrClosed) {
				t.Errorf("Add to a closed set: %v", err)
			}
		})
	}
}

// What a killed instance left is adopted, with names and addresses, or removed.
func TestSetAdopt(t *testing.T) {
	s := openSet(t, Options{})
	names := addMembers(t, s, "10.9.0.1/32", "2001:db8:9::1/128")
	first := s.Name()
	s.Close()
	s = openSet(t, Options{})
	m := s.Members()
	if s.Name() != first || len(m) != 2 || m[0].Name != names[0] || m[1].Name != names[1] {
		t.Errorf("adopted %s and %+v, want %s and %v", s.Name(), m, first, names)
	}
	if again := addMembers(t, s, "10.9.0.1/32"); again[0] != names[0] {
		t.Errorf("the same address again: %s, want %s", again[0], names[0])
	}
	s.Close()
	if ok, err := RemoveMembers("mi-phys"); !ok || err != nil {
		t.Errorf("RemoveMembers: %v, %v", ok, err)
	}
	if name, err := Find("mi-phys"); name != first || err != nil {
		t.Errorf("the first is %q, %v, want %s", name, err, first)
	}
	if l, err := memberLinks("mi-phys"); len(l) != 0 || err != nil {
		t.Errorf("left: %v, %v", l, err)
	}
	if ok, err := RemoveMembers("mi-phys"); ok || err != nil {
		t.Errorf("RemoveMembers again: %v, %v", ok, err)
	}
}

// A member that somebody deletes is the end, as the first is.
func TestSetDeleted(t *testing.T) {
	s := openSet(t, Options{})
	name := addMembers(t, s, "10.9.0.1/32")[0]
	sh(t, "ip link del "+name)
	if err := s.Join(nil, nil); err != nil {
		t.Error(err)
	}
	stop := time.AfterFunc(time.Minute, func() { s.Close() })
	defer stop.Stop()
	fs := frames(4, 64)
	for {
		_, err := s.ReadBatch(fs)
		if err == nil {
			continue
		}
		var gone *GoneError
		if !errors.As(err, &gone) || gone.Name != name {
			t.Errorf("got %v, want %s gone", err, name)
		}
		return
	}
}
