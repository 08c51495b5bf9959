// Pfkey speaks PF_KEYv2 to a socket of missiu for end-to-end tests. It shares
// no code with the product, so that a mistake there is not made twice. It
// shows keys: it is no tool for operators.
//
//	pfkey SOCKET dump              a JSON object for each SA
//	pfkey SOCKET add-sa JSON       as dump shows it
//	pfkey SOCKET add-policy JSON   {"dir","src","dst","proto","mode","tun_src","tun_dst","reqid"}
//	pfkey SOCKET raw HEX           sends octets as they are; prints the errno of the answer,
//	                               "closed" or "no answer"
//	pfkey SOCKET deaf N            sends N DUMPs and REGISTERs and never reads; ends at the end of its input
package main

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "pfkey:", err)
		os.Exit(1)
	}
}

type socket struct {
	fd  int
	seq uint32
}

func dial(path string) (*socket, error) {
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := syscall.Connect(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	tv := syscall.NsecToTimeval(int64(20 * time.Second))
	if err := syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &tv); err != nil {
		return nil, err
	}
	return &socket{fd: fd}, nil
}

// errEnd says that missiu closed the connection.
var errEnd = errors.New("connection closed")

func (s *socket) recv() ([]byte, error) {
	b := make([]byte, 1<<18)
	n, err := syscall.Read(s.fd, b)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, errEnd
	}
	return b[:n], nil
}

// ask sends a message and returns the answer, skipping events of others.
func (s *socket) ask(m []byte) (*message, error) {
	if _, err := syscall.Write(s.fd, m); err != nil {
		return nil, err
	}
	for {
		a, err := s.answer()
		if err != nil {
			return nil, err
		}
		if a != nil {
			return a, nil
		}
	}
}

// answer reads a message; nil for one that is not ours.
func (s *socket) answer() (*message, error) {
	b, err := s.recv()
	if err != nil {
		return nil, err
	}
	m, err := parse(b)
	if err != nil {
		return nil, err
	}
	if m.pid != uint32(os.Getpid()) || m.seq != s.seq && m.typ != dump {
		return nil, nil
	}
	if m.errno != 0 && !(m.typ == dump && syscall.Errno(m.errno) == syscall.ENOENT) {
		return m, fmt.Errorf("answer: %w", syscall.Errno(m.errno))
	}
	return m, nil
}

func run(args []string) error {
	if len(args) < 2 {
		return errors.New("want SOCKET VERB …")
	}
	s, err := dial(args[0])
	if err != nil {
		return err
	}
	s.seq = 1
	arg := ""
	if len(args) > 2 {
		arg = args[2]
	}
	switch args[1] {
	case "dump":
		return s.dump(os.Stdout)
	case "add-sa":
		var a SA
		if err := json.Unmarshal([]byte(arg), &a); err != nil {
			return err
		}
		_, err := s.ask(a.message(s.seq))
		return err
	case "add-policy":
		var p Policy
		if err := json.Unmarshal([]byte(arg), &p); err != nil {
			return err
		}
		_, err := s.ask(p.message(s.seq))
		return err
	case "raw":
		b, err := hex.DecodeString(arg)
		if err != nil {
			return err
		}
		return s.raw(b)
	case "deaf":
		n, err := strconv.Atoi(arg)
		if err != nil {
			return err
		}
		return s.deaf(n)
	}
	return fmt.Errorf("unknown verb %q", args[1])
}

func (s *socket) dump(w io.Writer) error {
	if _, err := syscall.Write(s.fd, header(dump, satypeESP, s.seq)); err != nil {
		return err
	}
	enc := json.NewEncoder(w)
	for {
		m, err := s.answer()
		if err != nil {
			return err
		}
		if m == nil || m.typ != dump {
			continue
		}
		if m.errno == 0 && m.ext[extSA] != nil {
			a, err := m.sa()
			if err != nil {
				return err
			}
			if err := enc.Encode(a); err != nil {
				return err
			}
		}
		if m.errno != 0 || m.seq == 0 {
			return nil
		}
	}
}

func (s *socket) raw(b []byte) error {
	tv := syscall.NsecToTimeval(int64(2 * time.Second))
	if err := syscall.SetsockoptTimeval(s.fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &tv); err != nil {
		return err
	}
	if _, err := syscall.Write(s.fd, b); err != nil {
		return err
	}
	a, err := s.recv()
	switch {
	case errors.Is(err, errEnd):
		fmt.Println("closed")
		return nil
	case errors.Is(err, syscall.EAGAIN):
		fmt.Println("no answer")
		return nil
	case err != nil:
		return err
	case len(a) < 16:
		return fmt.Errorf("answer of %d octets", len(a))
	}
	fmt.Println(int(a[2]))
	return nil
}

func (s *socket) deaf(n int) error {
	tv := syscall.NsecToTimeval(int64(time.Second))
	if err := syscall.SetsockoptTimeval(s.fd, syscall.SOL_SOCKET, syscall.SO_SNDTIMEO, &tv); err != nil {
		return err
	}
	sent := 0
	for ; sent < n; sent++ {
		typ := uint8(dump)
		if sent%2 == 1 {
			typ = register
		}
		if _, err := syscall.Write(s.fd, header(typ, satypeESP, uint32(sent+1))); err != nil {
			break // missiu need not take what it cannot answer
		}
	}
	fmt.Println("deaf after", sent)
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}
