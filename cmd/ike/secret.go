package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/missiu/missiu/pkg/ipsec"
)

// maxSecret bounds a key file.
const maxSecret = 64 << 10

// readSecret takes the key of -p or -P: @FILE, @- or, for old scripts, the key
// itself, of which visible tells. Errors never quote the value.
func readSecret(value string, stdin io.Reader) (key ipsec.Key, visible bool, err error) {
	name, isFile := strings.CutPrefix(value, "@")
	var b []byte
	switch {
	case !isFile:
		b, visible = []byte(value), true
	case name == "-":
		b, err = readAll(stdin)
	default:
		b, err = readPrivate(name)
	}
	if err != nil {
		return ipsec.Key{}, visible, err
	}
	if isFile {
		b = cutNewline(b)
	}
	b, err = decodeSecret(b)
	return ipsec.NewKey(b), visible, err
}

// readPrivate reads a file that nobody else may read; what counts is the file
// that is open, not its name.
func readPrivate(name string) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a FIFO must not hang us
	if err != nil {
		var pe *os.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	switch {
	case !fi.Mode().IsRegular():
		return nil, fmt.Errorf("%s: not a regular file", name)
	case fi.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("%s: mode %04o; want 0600", name, fi.Mode().Perm())
	case ok && int(st.Uid) != os.Geteuid():
		return nil, fmt.Errorf("%s: owned by uid %d; want %d", name, st.Uid, os.Geteuid())
	}
	b, err := readAll(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}

func readAll(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxSecret+1))
	if err == nil && len(b) > maxSecret {
		err = fmt.Errorf("more than %d octets", maxSecret)
	}
	return b, err
}

// cutNewline takes one final line end off.
func cutNewline(b []byte) []byte {
	if n := len(b); n > 0 && b[n-1] == '\n' {
		b = b[:n-1]
		if n > 1 && b[n-2] == '\r' {
			b = b[:n-2]
		}
	}
	return b
}

// decodeSecret reads 0x and hex digits as such, all else as text.
func decodeSecret(b []byte) ([]byte, error) {
	if digits, ok := strings.CutPrefix(string(b), "0x"); ok {
		k := make([]byte, hex.DecodedLen(len(digits)))
		switch _, err := hex.Decode(k, []byte(digits)); {
		case errors.Is(err, hex.ErrLength):
			return nil, errors.New("odd number of hex digits")
		case err == nil:
			b = k
		}
		// Not hex digits after all: text that happens to begin so.
	}
	if len(b) == 0 {
		return nil, errors.New("empty key")
	}
	return b, nil
}
