package ipcomp

import (
	"bytes"
	"compress/flate"
	"crypto/rand"
	"strings"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	var s Scratch
	buf, back := make([]byte, 70000), make([]byte, 65535)
	for _, n := range []int{Threshold, 91, 500, 1400, 4000, 65000} {
		src := []byte(strings.Repeat("all work and no play ", n/21+1))[:n]
		k, ok := s.Compress(buf, src)
		if !ok || k+HeaderLen >= n {
			t.Fatalf("%d octets of text: %d, %v", n, k, ok)
		}
		// Another implementation's order of calls: all at once.
		if m, err := s.Expand(back, buf[:k]); err != nil || !bytes.Equal(back[:m], src) {
			t.Fatalf("%d octets: got %d back, %v", n, m, err)
		}
		if m, err := s.Expand(back[:n], buf[:k]); err != nil || m != n {
			t.Errorf("%d octets into as much room: %d, %v", n, m, err)
		}
		if _, err := s.Expand(back[:n-1], buf[:k]); err != ErrMalformed {
			t.Errorf("%d octets into less room: %v", n, err)
		}
		if _, err := s.Expand(back, buf[:k-1]); err != ErrMalformed {
			t.Errorf("cut: %v", err)
		}
	}
}

// What does not become shorter by more than a header is not compressed.
func TestNotWorth(t *testing.T) {
	var s Scratch
	buf := make([]byte, 70000)
	for _, n := range []int{0, 1, Threshold - 1} {
		if _, ok := s.Compress(buf, make([]byte, n)); ok {
			t.Errorf("%d octets compressed", n)
		}
	}
	for range 3 {
		src := make([]byte, 1400)
		rand.Read(src)
		if n, ok := s.Compress(buf, src); ok {
			t.Errorf("noise compressed to %d", n)
		}
		// And the compressor is none the worse for it.
		if _, ok := s.Compress(buf, make([]byte, 1400)); !ok {
			t.Error("zeros not compressed")
		}
	}
}

// A bomb ends at the room it is given.
func TestBomb(t *testing.T) {
	var b bytes.Buffer
	w, _ := flate.NewWriter(&b, 9)
	w.Write(make([]byte, 50<<20))
	w.Close()
	if b.Len() > 65535 {
		t.Fatalf("bomb of %d octets", b.Len())
	}
	var s Scratch
	if _, err := s.Expand(make([]byte, 65535), b.Bytes()); err != ErrMalformed {
		t.Errorf("got %v, want %v", err, ErrMalformed)
	}
}

func TestNoAllocs(t *testing.T) {
	var s Scratch
	src, buf := []byte(strings.Repeat("all work and no play ", 60)), make([]byte, 2000)
	if n := testing.AllocsPerRun(100, func() {
		if _, ok := s.Compress(buf, src); !ok {
			t.Error("not compressed")
		}
	}); n != 0 {
		t.Errorf("%v allocations to compress, want 0", n)
	}
}

func FuzzExpand(f *testing.F) {
	var s Scratch
	buf := make([]byte, 2000)
	n, _ := s.Compress(buf, make([]byte, 1000))
	f.Add(buf[:n])
	f.Add([]byte{})
	dst := make([]byte, 4096)
	f.Fuzz(func(t *testing.T, src []byte) {
		n, err := s.Expand(dst, src)
		if err != nil {
			return
		}
		if k, ok := s.Compress(buf, dst[:n]); ok {
			back := make([]byte, n)
			if m, err := s.Expand(back, buf[:k]); err != nil || !bytes.Equal(back[:m], dst[:n]) {
				t.Errorf("%x compressed and expanded is %x, %v", dst[:n], back[:m], err)
			}
		}
	})
}

func BenchmarkCompress(b *testing.B) {
	var s Scratch
	src, buf := []byte(strings.Repeat("all work and no play ", 65)), make([]byte, 2000)
	b.ReportAllocs()
	b.SetBytes(int64(len(src)))
	for b.Loop() {
		s.Compress(buf, src)
	}
}
