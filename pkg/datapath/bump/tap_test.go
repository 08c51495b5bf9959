package bump

import (
	"net"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/missiu/missiu/internal/nstest"
	unixsock "github.com/missiu/missiu/pkg/attach"
	"github.com/missiu/missiu/pkg/datapath/tap"
)

// forward moves messages from one tap to the other until it ends.
func forward(from, to *net.UnixConn) {
	b := make([]byte, MaxFrame)
	for {
		n, err := from.Read(b)
		if err != nil {
			return
		}
		to.Write(b[:n])
	}
}

// TestTap: a program at both sides that forwards what it gets carries all traffic
// while they are active, gets copies and cannot write while they are passive, and
// nothing while they are closed.
func TestTap(t *testing.T) {
	newLab(t)
	b := open(t, Options{})
	startPump(t, b, [2]byte{}).hold.Store(true) // what the process itself gets goes nowhere
	var taps [2]*Tap
	var conns [2]*net.UnixConn
	dir := t.TempDir()
	for i := range taps {
		path := filepath.Join(dir, Side(i).String())
		var err error
		if taps[i], err = b.Listen(Side(i), path); err != nil {
			t.Fatal(err)
		}
		defer taps[i].Close()
	}
	dial := func() {
		t.Helper()
		for i := range conns {
			var err error
			if conns[i], err = unixsock.Dial(filepath.Join(dir, Side(i).String())); err != nil {
				t.Fatal(err)
			}
			until(t, "attached", func() bool { return taps[i].Stats().Programs == 1 })
		}
		go forward(conns[0], conns[1])
		go forward(conns[1], conns[0])
	}
	leave := func() {
		t.Helper()
		for i := range conns {
			conns[i].Close()
			until(t, "detached", func() bool { return taps[i].Stats().Programs == 0 })
		}
	}
	pings := func(what string, want int) {
		t.Helper()
		for _, to := range []string{"10.9.0.2", "fd09::2", "-s 8000 10.9.0.2"} {
			ping := silence
			if want > 0 { // after a silence the neighbours have to find each other again
				ping = answered
				until(t, what+", ping "+to, func() bool { return answered(t, 1, to) == 1 })
			}
			if got := ping(t, 5, to); got != want {
				t.Errorf("%s, ping %s: got %d of 5 answers, want %d", what, to, got, want)
			}
			if want == 0 {
				return // each silence takes a second
			}
		}
	}
	defer leave()
	set(t, b, Active, Active)
	pings("nobody attached", 0)
	dial()
	pings("attached", 5)
	for i := range taps {
		if s := taps[i].Stats(); s.Given < 15 || s.Taken < 15 || s.Lost != 0 {
			t.Errorf("%v: %+v", Side(i), s)
		}
	}
	conns[0].Write([]byte("no frame"))
	until(t, "a short message counted", func() bool { return taps[0].Stats().Bad == 1 })

	set(t, b, Passive, Passive)
	was := [2]TapStats{taps[0].Stats(), taps[1].Stats()}
	silent := b.Stats(Low).Silent
	time.Sleep(drain) // what was active still writes for so long
	pings("passive", 5)
	for i := range taps {
		until(t, "copies", func() bool { return taps[i].Stats().Given >= was[i].Given+15 })
	}
	until(t, "silence", func() bool { return b.Stats(Low).Silent >= silent+15 })

	set(t, b, Closed, Closed)
	pings("closed", 5) // and what was copied is given meanwhile
	was = [2]TapStats{taps[0].Stats(), taps[1].Stats()}
	pings("closed", 5)
	for i := range taps {
		if n := taps[i].Stats().Given - was[i].Given; n > 0 {
			t.Errorf("%v: %d frames while closed", Side(i), n)
		}
	}
	set(t, b, Active, Active)
	leave()
	pings("detached", 0)
	dial()
	pings("attached again", 5)
}

func until(t testing.TB, what string, done func() bool) {
	t.Helper()
	nstest.Until(t, what, done)
}

// TestTapCuts: of a super-frame programs get the frames that it stands for.
func TestTapCuts(t *testing.T) {
	srv, p := &Tap{}, &program{frames: make(chan []byte, tapFrames)}
	supers := 0
	tap.ProbeSuper(func(f *tap.Frame) syscall.Errno {
		srv.queue(p, []tap.Frame{*f})
		supers++
		got := 0
		head := int(f.Offload.HdrLen)
		for len(p.frames) > 0 {
			b := <-p.frames
			p.octets.Add(-int64(len(b)))
			if n := len(b) - head; n <= 0 || n > int(f.Offload.GSOSize) {
				t.Errorf("frame with %d octets of payload, want 1 to %d", n, f.Offload.GSOSize)
			}
			got += len(b) - head
		}
		if want := f.Len - head; got != want {
			t.Errorf("%+v: %d octets of payload, want %d", f.Offload, got, want)
		}
		return 0
	})
	if n := srv.Stats().Lost; supers < 3 || n != 0 {
		t.Errorf("%d super-frames tried, %d frames lost", supers, n)
	}
}
