package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/missiu/missiu/pkg/datapath/tap"
)

// openTAP opens the device, and with --vips own those of a killed instance that
// have addresses.
func (in *instance) openTAP(o tap.Options) (err error) {
	if in.o.vips != vipsOwn {
		in.tap, err = tap.Open(o)
		return err
	}
	s, err := tap.OpenSet(o)
	if err != nil {
		return err
	}
	in.tap, in.vips = s, s
	return nil
}

// addAddress gives this host an address that a peer has assigned.
func (in *instance) addAddress(p netip.Prefix) error {
	if !slices.Contains(in.assigned, p.Addr()) {
		in.assigned = append(in.assigned, p.Addr())
	}
	if in.vips == nil {
		err := in.address(tap.AddAddress, p)
		in.reroute(true) // routes may name it
		return err
	}
	if _, err := in.vips.Add(p); err != nil {
		return fmt.Errorf("TUN for %v: %w", p, err)
	}
	in.reroute(true)
	// An instance that was killed may have had it on the one device.
	if err := tap.DeleteAddress(in.tap.Index(), p); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("address %v: %w", p, err)
	}
	return nil
}

func except(l []netip.Addr, a netip.Addr) []netip.Addr {
	return slices.DeleteFunc(l, func(b netip.Addr) bool { return b == a })
}

// maxAwaited bounds the addresses that are remembered after they are gone.
const maxAwaited = 256

// deleteAddress takes it away, with its device. What policy has come from it
// is unreachable until there is another.
func (in *instance) deleteAddress(p netip.Prefix) error {
	was := slices.Contains(in.assigned, p.Addr()) || slices.Contains(in.awaited, p.Addr())
	in.assigned = except(in.assigned, p.Addr())
	drop := func() error {
		if in.vips != nil {
			if err := in.vips.Drop(p.Addr()); !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
		return in.address(tap.DeleteAddress, p)
	}
	if in.routes == nil {
		return drop()
	}
	in.awaited = append(except(in.awaited, p.Addr()), p.Addr())
	in.awaited = in.awaited[max(0, len(in.awaited)-maxAwaited):]
	in.route()
	err := in.routes.table.Without(p.Addr(), drop)
	if errors.Is(err, unix.ENOENT) && !was { // it never was
		in.awaited = except(in.awaited, p.Addr())
		in.route()
	}
	return err
}

// address changes an address of the device.
func (in *instance) address(change func(index int, p netip.Prefix) error, p netip.Prefix) error {
	if in.tap == nil {
		return fmt.Errorf("%w: no device for addresses", unix.EOPNOTSUPP)
	}
	if err := change(in.tap.Index(), p); err != nil {
		return fmt.Errorf("address %v: %w", p, err)
	}
	return nil
}

// vipDevices are the indexes of those with addresses.
func (in *instance) vipDevices() []int {
	var l []int
	for _, m := range in.vips.Members() {
		l = append(l, m.Index)
	}
	return l
}

// VIPStatus describes the TUN of an address.
type VIPStatus struct {
	Address netip.Prefix `json:"address"`
	Name    string       `json:"name"`
	MTU     int          `json:"mtu"`
}

func (in *instance) vipStatus() []VIPStatus {
	if in.vips == nil {
		return nil
	}
	l := []VIPStatus{}
	for _, m := range in.vips.Members() {
		l = append(l, VIPStatus{m.Address, m.Name, m.MTU})
	}
	return l
}
