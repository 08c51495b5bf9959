package keysock

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Dir is where the sockets of running instances are. Tests change it.
var Dir = "/run/missiu"

const (
	suffix    = ".pfkey"
	seqpacket = "unixpacket"
)

// Path returns the socket of the instance on an interface.
func Path(ifname string) string { return filepath.Join(Dir, ifname+suffix) }

// Find returns the socket of the instance on ifname, or with "" of the only
// instance that runs: ErrNoInstance if none does, and an error that names the
// interfaces to choose from if there are several. Sockets that a killed
// instance left do not count.
func Find(ifname string) (string, error) {
	if ifname != "" {
		path := Path(ifname)
		if !Alive(seqpacket, path) {
			return "", fmt.Errorf("%s: %w", ifname, ErrNoInstance)
		}
		return path, nil
	}
	paths, err := filepath.Glob(filepath.Join(Dir, "*"+suffix))
	if err != nil {
		return "", err
	}
	paths = slices.DeleteFunc(paths, func(p string) bool { return !Alive(seqpacket, p) })
	switch len(paths) {
	case 0:
		return "", ErrNoInstance
	case 1:
		return paths[0], nil
	}
	names := make([]string, len(paths))
	for i, p := range paths {
		names[i] = strings.TrimSuffix(filepath.Base(p), suffix)
	}
	return "", fmt.Errorf("several instances of missiu are running, choose one of %s", strings.Join(names, ", "))
}

// Alive reports whether a server listens at path, a socket of the network "unix" or
// "unixpacket". One that we may not connect to does: the caller's own attempt will tell
// why not.
func Alive(network, path string) bool {
	c, err := net.Dial(network, path)
	if err != nil {
		return errors.Is(err, os.ErrPermission)
	}
	c.Close()
	return true
}
