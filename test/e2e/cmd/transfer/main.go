// Transfer sends bytes over TCP and tells both ends' SHA-256, for end-to-end
// tests.
//
//	transfer listen ADDR:PORT          prints "listening", then one line for the connection
//	transfer send ADDR:PORT OCTETS     sends that many pseudo-random octets
//	transfer send ADDR:PORT OCTETS N   the same, but after N of them prints "holding" and waits for SIGUSR1
//
// The line of either end is "OCTETS SHA256 SECONDS".
package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

const limit = 4 * time.Minute

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "transfer:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "listen":
		return listen(args[1])
	case (len(args) == 3 || len(args) == 4) && args[0] == "send":
		var n [2]int64
		for i, arg := range args[2:] {
			var err error
			if n[i], err = strconv.ParseInt(arg, 10, 64); err != nil {
				return err
			}
		}
		return send(args[1], n[0], n[1])
	}
	return errors.New("want: listen ADDR:PORT, or send ADDR:PORT OCTETS [N]")
}

func listen(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	defer l.Close()
	fmt.Println("listening")
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(limit))
	start, h := time.Now(), sha256.New()
	n, err := io.Copy(h, c)
	if err != nil {
		return err
	}
	report(n, h, start)
	// Tells the sender that the last octet has arrived.
	_, err = c.Write([]byte{1})
	return err
}

func send(addr string, n, hold int64) error {
	goOn := make(chan os.Signal, 1)
	signal.Notify(goOn, syscall.SIGUSR1)
	c, err := net.DialTimeout("tcp", addr, 30*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(limit))
	var seed [32]byte
	copy(seed[:], addr)
	start, h := time.Now(), sha256.New()
	to, from := io.MultiWriter(c, h), rand.NewChaCha8(seed)
	if _, err := io.CopyN(to, from, hold); err != nil {
		return err
	}
	if hold > 0 {
		fmt.Println("holding")
		<-goOn
	}
	if _, err := io.CopyN(to, from, n-hold); err != nil {
		return err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		return fmt.Errorf("no acknowledgement: %w", err)
	}
	report(n, h, start)
	return nil
}

func report(n int64, h hash.Hash, start time.Time) {
	fmt.Printf("%d %x %.6f\n", n, h.Sum(nil), time.Since(start).Seconds())
}
