package daemon

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap/zapcore"
)

// The test binary is its own child: TestMain plays what Spawn starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "child" {
		child(os.Args[2])
		return
	}
	os.Exit(m.Run())
}

func child(how string) {
	r := NewReadiness(true)
	switch how {
	case "ready":
		r.Ready()
	case "fail":
		r.Fail(errors.New("no such interface:\nnope0"))
		os.Exit(1)
	case "die":
		os.Exit(1)
	case "hang":
		ctx, cancel := Signals(context.Background(), nil)
		defer cancel()
		<-ctx.Done()
	case "lock":
		p, err := LockPidFile(os.Args[3])
		if err != nil {
			r.Fail(err)
			os.Exit(1)
		}
		ctx, cancel := Signals(context.Background(), nil)
		defer cancel()
		r.Ready()
		<-ctx.Done()
		p.Close()
	}
}

func TestSpawn(t *testing.T) {
	for _, tt := range []struct {
		how     string
		timeout time.Duration
		want    string
	}{
		{"ready", time.Minute, ""},
		{"fail", time.Minute, "no such interface:; nope0"},
		{"die", time.Minute, "ended before it was ready"},
		{"hang", 200 * time.Millisecond, "not ready after 200ms"},
	} {
		t.Run(tt.how, func(t *testing.T) {
			pid, err := Spawn([]string{"child", tt.how}, tt.timeout)
			if tt.want == "" {
				if err != nil || pid == 0 {
					t.Fatalf("got pid %d, error %v", pid, err)
				}
				return
			}
			if err == nil || err.Error() != tt.want {
				t.Fatalf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestPidFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "eth0.pid")
	pid, err := Spawn([]string{"child", "lock", path}, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	_, err = LockPidFile(path)
	var run *RunningError
	if !errors.As(err, &run) || run.Pid != pid {
		t.Fatalf("second lock: got %v, want a RunningError with pid %d", err, pid)
	}
	if !strings.Contains(err.Error(), strconv.Itoa(pid)) {
		t.Errorf("%q does not name pid %d", err, pid)
	}
	if got, err := Owner(path); err != nil || got != pid {
		t.Errorf("Owner = %d, %v; want %d", got, err, pid)
	}
	syscall.Kill(pid, syscall.SIGKILL)
	deadline := time.Now().Add(time.Minute)
	for {
		if got, err := Owner(path); err == nil && got == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("lock outlives its owner")
		}
		time.Sleep(time.Millisecond)
	}
	// The file of a killed owner stands in nobody's way.
	p, err := LockPidFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := readPid(path); got != os.Getpid() {
		t.Errorf("pid in file %d, want %d", got, os.Getpid())
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("file still there: %v", err)
	}
	if got, err := Owner(path); got != 0 || err != nil {
		t.Errorf("Owner of a missing file = %d, %v", got, err)
	}
}

// Whoever asks for the owner is in nobody's way, and is told a pid even when he
// asks before it is written.
func TestPidFileAsked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "eth0.pid")
	stop := make(chan struct{})
	var asking sync.WaitGroup
	for range 4 {
		asking.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if pid, err := Owner(path); err != nil || pid != 0 && pid != os.Getpid() {
					t.Errorf("Owner = %d, %v; want 0 or %d", pid, err, os.Getpid())
					return
				}
			}
		})
	}
	for range 300 {
		p, err := LockPidFile(path)
		if err != nil {
			t.Errorf("nobody holds the lock: %v", err)
			break
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	asking.Wait()
}

func TestNotify(t *testing.T) {
	name := filepath.Join(t.TempDir(), "n")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	t.Setenv("NOTIFY_SOCKET", name)
	NewReadiness(false).Ready()
	c.SetReadDeadline(time.Now().Add(time.Minute))
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err != nil || string(b[:n]) != "READY=1" {
		t.Fatalf("got %q, %v", b[:n], err)
	}
}

func TestSignals(t *testing.T) {
	hup := make(chan struct{}, 1)
	ctx, cancel := Signals(t.Context(), func() { hup <- struct{}{} })
	defer cancel()
	syscall.Kill(os.Getpid(), syscall.SIGHUP)
	<-hup
	if ctx.Err() != nil {
		t.Fatal("HUP ended the context")
	}
	syscall.Kill(os.Getpid(), syscall.SIGTERM)
	<-ctx.Done()
}

func TestLogFile(t *testing.T) {
	if got := LogPath("missiu.log"); got != "/var/run/missiu.log" {
		t.Errorf("LogPath = %q", got)
	}
	if got := LogPath("/tmp/x"); got != "/tmp/x" {
		t.Errorf("LogPath = %q", got)
	}
	path := filepath.Join(t.TempDir(), "log")
	f, err := OpenLog(path)
	if err != nil {
		t.Fatal(err)
	}
	l := NewLogger(f, zapcore.InfoLevel)
	l.Named("x").Info("one")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	l.Info("two")
	if err := f.Reopen(); err != nil {
		t.Fatal(err)
	}
	l.Info("three")
	a, _ := os.ReadFile(path + ".1")
	b, _ := os.ReadFile(path)
	if !strings.Contains(string(a), "info x one") || !strings.Contains(string(a), "two") || !strings.Contains(string(b), "three") || strings.Contains(string(a), "three") {
		t.Errorf("rotated %q, new %q", a, b)
	}
	if s, _ := os.Stat(path); s.Mode().Perm()&0o007 != 0 {
		t.Errorf("mode %v is open to the world", s.Mode())
	}
	if _, err := OpenLog(filepath.Join(path, "below-a-file")); err == nil {
		t.Error("no error for an impossible path")
	}
}
