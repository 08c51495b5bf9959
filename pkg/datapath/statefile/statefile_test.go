package statefile

import (
	"io"
	"os"
	"path/filepath"
	"testing"
)

// TestWrite: the file is there, nobody else's to read, and is replaced rather than
// written to: who has it open keeps what it was.
func TestWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "eth0.x")
	if err := Write(path, []byte("first, the longer one")); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Write(path, []byte("second")); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); string(b) != "second" {
		t.Errorf("got %q, %v", b, err)
	}
	if b, err := io.ReadAll(f); string(b) != "first, the longer one" {
		t.Errorf("opened before: got %q, %v", b, err)
	}
	if i, err := os.Stat(path); err != nil || i.Mode() != 0o600 {
		t.Errorf("mode %v, %v, want 0600", i.Mode(), err)
	}
	if l, err := os.ReadDir(filepath.Dir(path)); len(l) != 1 {
		t.Errorf("in the directory: %v, %v", l, err)
	}
	if err := Write(filepath.Join(path, "below"), nil); err == nil {
		t.Error("no error where the directory is a file")
	}
}
