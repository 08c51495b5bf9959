package bump

import (
	"context"
	"net"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	unixsock "github.com/missiu/missiu/pkg/attach"
	"github.com/missiu/missiu/pkg/capture"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

// TestNoAlloc: frames cost no allocation in either direction, without a monitor
// and with one, and none where a program has the side.
func TestNoAlloc(t *testing.T) {
	l := newLab(t)
	b := open(t, Options{})
	set(t, b, Active, Active)
	path := monitored(t, b)

	// What sends a frame to each side, by their numbers.
	frame := append([]byte{255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 9, 0x88, 0xb5}, make([]byte, 1000)...)
	var from [2]int
	sender := func(ifname string) int {
		i, err := net.InterfaceByName(ifname)
		if err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: i.Index})
		}
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	from[High] = sender("e0")
	l.at(func() { from[Low] = sender("e1") })
	defer unix.Close(from[High])
	defer unix.Close(from[Low])

	fs := make([]tap.Frame, maxBatch)
	for i := range fs {
		fs[i].Buf = make([]byte, 70000)
	}
	read := func(s Side) int {
		for i := range fs {
			fs[i].Off = 64
		}
		n, err := b.ReadBatch(s, fs)
		if err != nil {
			return 0
		}
		return n
	}
	through := func(s Side) func() {
		return func() {
			unix.Write(from[s], frame)
			n := read(s)
			if _, err := b.WriteBatch(1-s, fs[:n]); err != nil {
				t.Error(err)
			}
		}
	}
	check := func(what string, f func()) {
		t.Helper()
		for range 10 {
			f() // what is made once
		}
		if n := testing.AllocsPerRun(50, f); n != 0 {
			t.Errorf("%s: %v allocations a frame", what, n)
		}
	}
	check("from high", through(High))
	check("from low", through(Low))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r, err := capture.Dial(ctx, path, capture.Both)
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the monitor", func() bool { return len(*b.sides[Low].attached.Load()) == 1 })
	check("from high, monitored", through(High))
	check("from low, monitored", through(Low))
	r.Close()
	until(t, "no monitor", func() bool { return len(*b.sides[Low].attached.Load()) == 0 })

	for _, s := range []Side{High, Low} {
		path := filepath.Join(t.TempDir(), s.String())
		tp, err := b.Listen(s, path)
		if err != nil {
			t.Fatal(err)
		}
		defer tp.Close()
		c, err := unixsock.Dial(path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		until(t, "the program", func() bool { return tp.Stats().Programs == 1 })
		c.SetDeadline(time.Now().Add(time.Minute))
		got := make([]byte, MaxFrame)
		take := func(n int) {
			b.sides[s].hand(fs[:n])
			for range n {
				if _, err := c.Read(got); err != nil {
					t.Error(err)
				}
			}
		}
		n := copy(fs[0].Buf[64:], frame)
		check(s.String()+" to a program", func() {
			fs[0].Off, fs[0].Len, fs[0].Offload = 64, n, tap.Offload{}
			take(1)
		})
		check(s.String()+" from a program", func() {
			was := tp.taken.Load() + tp.bad.Load()
			c.Write(frame)
			for tp.taken.Load()+tp.bad.Load() == was && t.Context().Err() == nil {
				runtime.Gosched()
			}
		})
	}
}
