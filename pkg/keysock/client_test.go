package keysock

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/proto/pfkey"
)

// peer is a server that is a function: what it returns is sent, in order.
func peer(t *testing.T, answer func(m *pfkey.Message) []*pfkey.Message) string {
	t.Helper()
	path := filepath.Join(tempDir(t), "peer")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Add(1)
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	go func() {
		defer wg.Done()
		for {
			nc, err := ln.AcceptUnix()
			if err != nil {
				return
			}
			wg.Add(1)
			go func() {
				defer wg.Done()
				defer nc.Close()
				b := make([]byte, maxMessage)
				for {
					n, err := nc.Read(b)
					if err != nil {
						return
					}
					m, err := pfkey.Decode(b[:n])
					if err != nil {
						t.Errorf("peer got %x: %v", b[:n], err)
						return
					}
					l := []*pfkey.Message{m}
					if m.Type != pfkey.Register {
						l = answer(m)
					}
					for _, a := range l {
						out, err := a.Append(nil)
						if err != nil {
							t.Errorf("peer: %v", err)
						}
						nc.Write(out)
					}
				}
			}()
		}
	}()
	return path
}

func dialPeer(t *testing.T, answer func(m *pfkey.Message) []*pfkey.Message) *Client {
	t.Helper()
	c, err := Dial(context.Background(), peer(t, answer))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// An answer is what has our pid, our seq and our type; the rest is passed over.
func TestClientMatches(t *testing.T) {
	c := dialPeer(t, func(m *pfkey.Message) []*pfkey.Message {
		with := func(f func(h *pfkey.Header)) *pfkey.Message {
			o := &pfkey.Message{Header: m.Header}
			o.Errno = uint8(syscall.EPERM)
			f(&o.Header)
			return o
		}
		return []*pfkey.Message{
			with(func(h *pfkey.Header) { h.Pid++ }),
			with(func(h *pfkey.Header) { h.Pid = 0 }),
			with(func(h *pfkey.Header) { h.Seq-- }),
			with(func(h *pfkey.Header) { h.Type = pfkey.XSPDFlush }),
			with(func(h *pfkey.Header) { h.Errno = uint8(syscall.EXFULL) }),
			with(func(h *pfkey.Header) {}), // nobody waits for it any more
		}
	})
	err := c.Flush(context.Background(), 0)
	var e *Error
	if !errors.As(err, &e) || e.Type != pfkey.Flush || !errors.Is(err, syscall.EXFULL) {
		t.Errorf("got %v, want EXFULL", err)
	}
	if want := "pf_key: FLUSH: exchange full"; err.Error() != want {
		t.Errorf("got %q, want %q", err, want)
	}
}

// A request that nobody waits for any more does not disturb those after it, even
// when they have its seq.
func TestClientGivesUp(t *testing.T) {
	var late []*pfkey.Message
	c := dialPeer(t, func(m *pfkey.Message) []*pfkey.Message {
		a := &pfkey.Message{Header: m.Header}
		switch {
		case m.Type == pfkey.Add && m.SA.SPI == 0x1000:
			a.Errno = uint8(syscall.EPERM)
			late = append(late, a)
			return nil
		case m.Type == pfkey.Dump:
			late = append(late, a)
			return nil
		}
		l := append(late, a)
		late = nil
		return l
	})
	short := func() context.Context {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		t.Cleanup(cancel)
		return ctx
	}
	wantErr(t, "Add", c.Add(short(), params(0x1000), 7), context.DeadlineExceeded)
	_, err := c.Dump(short(), 0)
	wantErr(t, "Dump", err, context.DeadlineExceeded)
	wantErr(t, "Add", c.Add(context.Background(), params(0x2000), 7), nil)
	gone, cancel := context.WithCancelCause(context.Background())
	why := errors.New("why")
	cancel(why)
	wantErr(t, "Add with a context that is over", c.Add(gone, params(0x1000), 7), why)
	wantErr(t, "Add", c.Add(context.Background(), params(0x2000), 7), nil)
}

// A server that does not read does not hold a request beyond its context.
func TestClientSendTimesOut(t *testing.T) {
	block := make(chan struct{})
	c := dialPeer(t, func(m *pfkey.Message) []*pfkey.Message {
		<-block
		return []*pfkey.Message{{Header: m.Header}}
	})
	var wg sync.WaitGroup
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	for range 2000 { // more than the socket buffer holds
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := c.Flush(ctx, 0); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v, want the deadline", err)
			}
		}()
	}
	wg.Wait()
	close(block)
	wantErr(t, "Flush afterwards", c.Flush(context.Background(), 0), nil)
}

func TestClientBadAnswers(t *testing.T) {
	var mode atomic.Int32
	c := dialPeer(t, func(m *pfkey.Message) []*pfkey.Message {
		a := &pfkey.Message{Header: m.Header}
		switch mode.Load() {
		case 0: // an answer without what it needs
			return []*pfkey.Message{a}
		case 1: // a dump with one bad entry
			a.Seq = 1
			good := &pfkey.Message{Header: m.Header}
			if err := putSA(good, &SAInfo{SAParams: *params(0x1000)}, withKeys|withPrivate); err != nil {
				t.Error(err)
			}
			good.Type, good.Seq = pfkey.Dump, 0
			return []*pfkey.Message{a, good}
		}
		a.Errno = 2
		return []*pfkey.Message{a}
	})
	ctx := context.Background()
	_, err := c.GetSPI(ctx, GetSPI{Proto: ipsec.ESP, Src: addr("10.0.0.1"), Dst: addr("10.0.0.2")})
	wantErr(t, "GetSPI", err, syscall.EBADMSG)
	_, err = c.Get(ctx, params(0x1000).SAID, addr("10.0.0.1"))
	wantErr(t, "Get", err, syscall.EINVAL)
	_, err = c.GetPolicy(ctx, 1)
	wantErr(t, "GetPolicy", err, syscall.EINVAL)
	_, err = c.Status(ctx)
	wantErr(t, "Status", err, syscall.EBADMSG)
	mode.Store(1)
	_, err = c.Dump(ctx, 0)
	wantErr(t, "Dump", err, syscall.EINVAL)
	mode.Store(2)
	l, err := c.Dump(ctx, 0)
	if len(l) != 0 || err != nil {
		t.Errorf("Dump after a bad one: got %v, %v, want none", l, err)
	}
}

// Keys do not show in errors.
func TestErrorsHaveNoKeys(t *testing.T) {
	p := params(0x1000)
	p.EncrKey = ipsec.NewKey([]byte("0123456789abcde"))
	r := start(t, ServerOptions{})
	err := r.dial().Add(r.ctx(), p, 0)
	wantErr(t, "Add", err, syscall.EINVAL)
	err2 := checkParams(p)
	wantErr(t, "checkParams", err2, syscall.EINVAL)
	if s := err.Error() + err2.Error(); strings.Contains(s, "0123") || strings.Contains(s, "3031") {
		t.Errorf("error shows a key: %s", s)
	}
}

// Two clients of a process have different pids, and the process id can be seen.
func TestClientPIDs(t *testing.T) {
	seen := map[uint32]bool{}
	for range 100 {
		p := newPID()
		if seen[p] {
			t.Fatalf("%#x twice", p)
		}
		seen[p] = true
		if p&(1<<22-1) != uint32(syscall.Getpid()) {
			t.Fatalf("pid %d in %#x", syscall.Getpid(), p)
		}
	}
}

// Events that nobody reads are dropped, and Lost stands where they would.
func TestEventPump(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newEventPump(3)
		go p.run()
		e := func(n uint32) Event { return Acquire{Seq: n} }
		p.put(e(1))
		synctest.Wait() // 1 is in the hands of run
		for n := range uint32(5) {
			p.put(e(2 + n)) // 2, 3, 4 wait, 5, 6 are lost
		}
		read := func() Event { synctest.Wait(); v := <-p.out; synctest.Wait(); return v }
		got := []Event{read(), read()}
		p.put(e(7))
		p.put(e(8))
		p.put(Lost{10})
		for len(got) < 6 {
			got = append(got, read())
		}
		want := []Event{e(1), e(2), e(3), e(4), Lost{2}, e(7)}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
		if v := read(); v != (Lost{11}) { // 8 and what the server lost
			t.Errorf("got %v, want Lost{11}", v)
		}
		p.put(e(9))
		p.end()
		if v := read(); !reflect.DeepEqual(v, e(9)) {
			t.Errorf("got %v, want 9", v)
		}
		if v, ok := <-p.out; ok {
			t.Errorf("got %v, want the end", v)
		}
	})
}

func TestDialRefused(t *testing.T) {
	_, err := Dial(context.Background(), filepath.Join(tempDir(t), "nobody"))
	wantErr(t, "Dial", err, syscall.ENOENT)
}

// A client of a server that ends learns it.
func TestClientEnd(t *testing.T) {
	r := start(t, ServerOptions{})
	c := r.dial()
	r.stop()
	select {
	case _, ok := <-c.Events():
		if ok {
			t.Error("an event")
		}
	case <-time.After(time.Minute):
		t.Error("Events stays open")
	}
	wantErr(t, "Flush", c.Flush(context.Background(), 0), ErrClosed)
	if err := c.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}
