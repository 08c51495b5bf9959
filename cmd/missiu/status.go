package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/daemon"
	"github.com/missiu/missiu/pkg/keysock"
)

// Status is the document behind `missiu status`. Fields are only ever added.
type Status struct {
	Interface string            `json:"interface"`
	Pid       int               `json:"pid"`
	Version   string            `json:"version"`
	Since     time.Time         `json:"since"`
	Mode      string            `json:"mode"` // "raw", "tun", "inline"
	Default   string            `json:"default"`
	TAP       TAPStatus         `json:"tap"`            // or TUN
	VIPs      []VIPStatus       `json:"vips,omitempty"` // TUNs of addresses, with --vips own
	Routes    RouteStatus       `json:"routes"`
	Bump      *BumpStatus       `json:"bump,omitempty"` // of an interface that is severed
	MTU       int               `json:"mtu"`            // of the interface
	Paths     map[string]string `json:"paths"`
	SAs       int               `json:"sas"`
	Policies  int               `json:"policies"`
	Held      int               `json:"held"` // packets that wait for an SA
	Queues    []QueueStatus     `json:"queues,omitempty"`
	Counters  map[string]uint64 `json:"counters"`
}

// TAPStatus describes the TAP.
type TAPStatus struct {
	Name string `json:"name"`
	MAC  string `json:"mac"`
	MTU  int    `json:"mtu"`
}

// QueueStatus describes a queue of the TAP, where there are several, and its workers.
type QueueStatus struct {
	Queue int    `json:"queue"` // from 1
	SAs   int    `json:"sas"`   // for it alone, both directions
	Out   uint64 `json:"out"`   // packets protected
	In    uint64 `json:"in"`    // packets accepted by the worker of this number
}

// status asks one instance, or all that run when no interface is named.
func status(o *options, w io.Writer) error {
	names := []string{o.ifname}
	if o.ifname == "" {
		if names = instances(); len(names) == 0 {
			return keysock.ErrNoInstance
		}
	}
	var all []Status
	var errs []error
	for _, name := range names {
		s, err := ask(keysock.Path(name))
		if gone(err) {
			err = absent(name)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
			continue
		}
		all = append(all, *s)
	}
	if o.json {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		for i := range all {
			if err := e.Encode(&all[i]); err != nil {
				return err
			}
		}
	} else {
		for i := range all {
			all[i].print(w)
		}
	}
	return errors.Join(errs...)
}

// lockSuffix: the lock file of a socket is removed by an orderly stop only.
const lockSuffix = ".lock"

// instances returns the interfaces of those that run or have died.
func instances() []string {
	var names []string
	for _, suffix := range []string{"", lockSuffix} {
		paths, _ := filepath.Glob(keysock.Path("*") + suffix) // the pattern is well formed
		for _, p := range paths {
			names = append(names, strings.TrimSuffix(filepath.Base(p), filepath.Base(keysock.Path(""))+suffix))
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// gone: nobody listens on the socket, or there is none.
func gone(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ENOENT) || errors.Is(err, keysock.ErrClosed)
}

// absent says why nobody answers for an interface.
func absent(ifname string) error {
	if pid, err := daemon.Owner(pidPath(ifname)); err == nil && pid != 0 {
		return fmt.Errorf("pid %d is starting or stopping", pid)
	}
	for _, suffix := range []string{"", lockSuffix} {
		if _, err := os.Stat(keysock.Path(ifname) + suffix); err == nil {
			return errDied
		}
	}
	return keysock.ErrNoInstance
}

var errDied = errors.New("the instance has died; what its policies protect stays blocked until startRaw or stop")

func ask(path string) (*Status, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := keysock.Dial(ctx, path)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	raw, err := c.Status(ctx)
	if err != nil {
		return nil, err
	}
	s := new(Status)
	return s, json.Unmarshal(raw, s)
}

func (s *Status) print(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintf(t, "%s\tpid %d, up %v, mtu %d\n", s.Interface, s.Pid, time.Since(s.Since).Truncate(time.Second), s.MTU)
	switch {
	case s.Bump != nil:
		fmt.Fprintf(t, "  severed\thigh %s, low %s; when missiu dies: %s; by %s\n", s.Bump.High, s.Bump.Low, s.Bump.Fail, s.Bump.By)
	case s.Mode == modeTUN:
		fmt.Fprintf(t, "  tun\t%s, mtu %d\n", s.TAP.Name, s.TAP.MTU)
	default:
		fmt.Fprintf(t, "  tap\t%s, %s, mtu %d\n", s.TAP.Name, s.TAP.MAC, s.TAP.MTU)
	}
	for _, v := range s.VIPs {
		fmt.Fprintf(t, "  tun\t%s, mtu %d, for %v\n", v.Name, v.MTU, v.Address)
	}
	if r := s.Routes; r.Table != 0 {
		fmt.Fprintf(t, "  routes\t%s: %d destinations in table %d, rule %d\n", r.Mode, r.Destinations, r.Table, r.Rule)
	}
	for _, k := range sortedKeys(s.Paths) {
		fmt.Fprintf(t, "  %s\t%s\n", k, s.Paths[k])
	}
	fmt.Fprintf(t, "  policies\t%d, no match: %s\n", s.Policies, s.Default)
	fmt.Fprintf(t, "  sas\t%d, packets waiting: %d\n", s.SAs, s.Held)
	for _, q := range s.Queues {
		fmt.Fprintf(t, "  queue %d\tout: %d, in: %d packets; sas of its own: %d\n", q.Queue, q.Out, q.In, q.SAs)
	}
	for _, k := range sortedKeys(s.Counters) {
		if v := s.Counters[k]; v != 0 {
			fmt.Fprintf(t, "  %s\t%d\n", strings.ReplaceAll(k, "_", " "), v)
		}
	}
	t.Flush()
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
