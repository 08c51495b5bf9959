package wire

import (
	"errors"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The table is without protection against other administrators of the packet
// filter: `nft flush ruleset`, at the head of many rule files, takes it away
// with the rest. (A table with an owner would be safe from that, and would go
// with its owner's death, which must not open the host.) So deletions are
// listened for, and what is missing is put back at once.

// guardRetry is the pause after an attempt to put the table back failed.
const guardRetry = time.Second

// listenNft subscribes to changes of the packet filter.
func listenNft() (*netlink.Conn, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, missing(nftError(err))
	}
	if err := c.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		c.Close()
		return nil, nftError(err)
	}
	return c, nil
}

// guard puts the table back when somebody else has taken of it. It ends when
// events is closed.
func (w *Wire) guard(events *netlink.Conn) {
	defer w.following.Done()
	for {
		msgs, err := events.Receive()
		if w.closing.Load() {
			return
		}
		// Too many events at once is an event, too.
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			select {
			case <-w.stop:
				return
			case <-time.After(guardRetry):
			}
		}
		if err == nil && !takes(msgs) {
			continue
		}
		for w.mend() != nil {
			select {
			case <-w.stop:
				return
			case <-time.After(guardRetry):
			}
		}
	}
}

// takes reports whether one of the events is a deletion from a table of the
// netdev family. Elements do not count: they are our own changes nearly always.
func takes(msgs []netlink.Message) bool {
	for _, m := range msgs {
		if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) == 0 || m.Data[0] != unix.NFPROTO_NETDEV {
			continue
		}
		switch m.Header.Type & 0xff {
		case unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE, unix.NFT_MSG_DELSET:
			return true
		}
	}
	return false
}

// mend puts the table back if anything of it is missing.
func (w *Wire) mend() error {
	w.setMu.Lock()
	defer w.setMu.Unlock()
	mended, err := w.chain.mend()
	if _, gone := w.handle.LinkByIndex(w.index); err != nil && gone != nil {
		return nil // with its interface; follow tells
	}
	if mended || err != nil {
		select {
		case <-w.tampered: // the older news
		default:
		}
		w.tampered <- err // the only sender, so there is room
	}
	return err
}

// Tampered delivers nil when somebody else had removed packet filter rules of
// this interface and they are back, or the error that keeps them away; it is
// tried again then.
func (w *Wire) Tampered() <-chan error { return w.tampered }

func (h *chain) mend() (bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	old, err := findTable(h.c, h.ifname)
	if err != nil {
		return false, err
	}
	if old != nil && h.intact() {
		return false, nil
	}
	return true, h.build(old)
}

// intact: every chain has as many rules as we gave it. (Sets that rules use
// cannot be deleted.)
func (h *chain) intact() bool {
	chains, err := h.c.ListChainsOfTableFamily(h.table.Family)
	if err != nil {
		return false
	}
	found := 0
	for _, c := range chains {
		if c.Table.Name != h.table.Name || h.ruled[c.Name] == 0 {
			continue
		}
		rules, err := h.c.GetRules(h.table, c)
		if err != nil || len(rules) < h.ruled[c.Name] {
			return false
		}
		found++
	}
	return found == len(h.ruled)
}
