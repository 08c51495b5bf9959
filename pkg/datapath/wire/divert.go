package wire

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"os"

	"github.com/gaissmai/bart"
	"golang.org/x/sys/unix"
)

// maxIncrement is the number of changed prefixes beyond which the whole set is
// made anew; 100,000 at once cost less so.
const maxIncrement = 256

// SetDivert replaces the divert set. While it changes, packets whose source is
// only in the old or only in the new set may be lost; a packet never goes to
// the stack and to ReadBatch both.
func (w *Wire) SetDivert(v4, v6 []netip.Prefix) error {
	for _, p := range v4 {
		if !p.IsValid() || !p.Addr().Is4() {
			return fmt.Errorf("divert %v: not an IPv4 prefix", p)
		}
	}
	for _, p := range v6 {
		if !p.IsValid() || !p.Addr().Is6() || p.Addr().Is4In6() {
			return fmt.Errorf("divert %v: not an IPv6 prefix", p)
		}
	}
	w.setMu.Lock()
	defer w.setMu.Unlock()
	return w.divert(table(v4, v6), nil)
}

// ChangeDivert adds prefixes of both families to the divert set and takes others
// from it. It keeps what SetDivert promises. A prefix that is there already, or
// not there to be taken, is no error; what an instance before left goes.
//
// Its cost depends on the number of prefixes changed, and that of prefixes of
// more than one address a little on how many of them there are: see chain.
func (w *Wire) ChangeDivert(add, remove []netip.Prefix) error {
	for _, l := range [][]netip.Prefix{add, remove} {
		for _, p := range l {
			if !p.IsValid() || p.Addr().Is4In6() {
				return fmt.Errorf("divert %v: not a prefix", p)
			}
		}
	}
	w.setMu.Lock()
	defer w.setMu.Unlock()
	next := w.sets.Load().divert
	if len(add)+len(remove) > maxIncrement {
		next = next.Clone()
		for _, p := range add {
			next.Insert(p)
		}
		for _, p := range remove {
			next.Delete(p)
		}
		return w.divert(next, nil)
	}
	changed := make([]netip.Prefix, 0, len(add)+len(remove))
	for _, p := range add {
		next, changed = next.InsertPersist(p), append(changed, p)
	}
	for _, p := range remove {
		next, changed = next.DeletePersist(p), append(changed, p)
	}
	return w.divert(next, changed)
}

// divert puts next in force, which differs from what is in force in changed at
// most; nil means anywhere.
func (w *Wire) divert(next *bart.Lite, changed []netip.Prefix) error {
	old := w.sets.Load()
	// First the reader takes what both sets hold, then the chain changes, then
	// the reader takes the new set: at each moment the chain drops all that
	// the reader takes.
	w.sets.Store(&sets{divert: old.divert, also: next, local: old.local})
	if err := w.filter(nil); err != nil {
		w.sets.Store(old)
		return err
	}
	if err := w.chain.setDivert(next, changed); err != nil {
		w.sets.Store(old)
		return errors.Join(err, w.filter(old.divert))
	}
	w.sets.Store(&sets{divert: next, local: old.local})
	return w.filter(next)
}

var (
	everything4 = cover{spanOf(netip.PrefixFrom(netip.IPv4Unspecified(), 0))}
	everything6 = cover{spanOf(netip.PrefixFrom(netip.IPv6Unspecified(), 0))}
)

// maxFilterPrefixes is how many are looked at one by one, at each change, for the
// ranges of a socket filter.
const maxFilterPrefixes = 500

// filterCover is what a socket filter takes of divert, in all of its family: all of
// it exactly, if that is not too much, else what holds it.
func filterCover(divert *bart.Lite, all netip.Prefix, size int, ps iter.Seq[netip.Prefix]) cover {
	if size <= maxFilterPrefixes {
		if c := coverOf(ps); len(c) <= maxFilterSpans {
			return c
		}
	}
	return roughly(divert, all, maxFilterSpans)
}

// filter exchanges the reader's socket filter for one that lets pass what is in
// divert; nil: all IP.
func (w *Wire) filter(divert *bart.Lite) error {
	v4, v6 := everything4, everything6
	if divert != nil {
		v4 = filterCover(divert, netip.PrefixFrom(netip.IPv4Unspecified(), 0), divert.Size4(), divert.All4())
		v6 = filterCover(divert, netip.PrefixFrom(netip.IPv6Unspecified(), 0), divert.Size6(), divert.All6())
	}
	f, err := socketFilter(v4, v6, 1+len(w.more))
	if err != nil {
		return err
	}
	if e := w.reader.raw.Control(func(fd uintptr) { err = attachFilter(int(fd), f) }); e != nil {
		return os.ErrClosed
	}
	if divert != nil && errors.Is(err, unix.ENOMEM) {
		// net.core.optmem_max, 20 KiB before Linux 6.9, bounds the program. One that
		// lets more pass costs time, nothing else.
		w.fellBack("socket filter", "one that lets all IP pass", err)
		return w.filter(nil)
	}
	return err
}
