package tap

import "errors"

// Open makes a TAP, or adopts the one called o.Name that a killed instance
// left. It has one queue, which the kernel gives to one process only: with
// IFF_MULTI_QUEUE a second process could attach unnoticed and take frames away.
func Open(o Options) (Device, error) { return nil, errors.New("tap: not built yet") }

// Find returns the name of the TAP that an earlier instance made for the
// interface ifname, "" if there is none.
func Find(ifname string) (string, error) { return "", nil }

// Remove deletes the TAP that an earlier instance made for the interface
// ifname; it reports whether there was one.
func Remove(ifname string) (bool, error) { return false, nil }
