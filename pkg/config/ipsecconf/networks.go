package ipsecconf

import (
	"bufio"
	"errors"
	"io"
	"net/netip"
	"os"
	"strings"
)

// systemNet looks a network up in networks(5).
func systemNet(name string) (netip.Prefix, error) {
	f, err := os.Open("/etc/networks")
	if err != nil {
		return netip.Prefix{}, err
	}
	defer f.Close()
	return findNet(f, name)
}

// findNet finds the line "name number alias..." of a network. Of its number, of
// one to four octets, those at the end that are 0 are no part of the prefix.
func findNet(r io.Reader, name string) (netip.Prefix, error) {
	s := bufio.NewScanner(r)
	for s.Scan() {
		line, _, _ := strings.Cut(s.Text(), "#")
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		names := append([]string{f[0]}, f[2:]...)
		for _, n := range names {
			if !strings.EqualFold(n, name) {
				continue
			}
			number := f[1]
			for strings.Count(number, ".") < 3 {
				number += ".0"
			}
			a, err := netip.ParseAddr(number)
			if err != nil {
				return netip.Prefix{}, err
			}
			b := a.As4()
			octets := 4
			for octets > 0 && b[octets-1] == 0 {
				octets--
			}
			return netip.PrefixFrom(a, octets*8), nil
		}
	}
	if err := s.Err(); err != nil {
		return netip.Prefix{}, err
	}
	return netip.Prefix{}, errors.New("no such network")
}
