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
// listened for, and what is missing is put back at once. So are changes of the
// sets by others, which ours would build on.

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
		what := rulesGone
		if err == nil {
			what = w.chain.harm(msgs)
		}
		if what == harmless {
			continue
		}
		for w.mend(what) != nil {
			select {
			case <-w.stop:
				return
			case <-time.After(guardRetry):
			}
		}
	}
}

// harm is what others did to the table.
type harm uint8

const (
	harmless  harm = iota
	rulesGone      // perhaps: it is to be looked at
	setsChanged
)

// harm judges events of the netdev family.
func (h *chain) harm(msgs []netlink.Message) harm {
	worst := harmless
	for _, m := range msgs {
		if m.Header.PID == h.pid || m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < 4 || m.Data[0] != unix.NFPROTO_NETDEV {
			continue
		}
		switch m.Header.Type & 0xff {
		case unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE, unix.NFT_MSG_DELSET:
			worst = max(worst, rulesGone)
		case unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM:
			d, err := netlink.NewAttributeDecoder(m.Data[4:])
			for err == nil && d.Next() {
				if d.Type() == unix.NFTA_SET_ELEM_LIST_TABLE && d.String() == tableName(h.ifname) {
					worst = setsChanged
				}
			}
		}
	}
	return worst
}

// mend puts the table back if anything of it is missing.
func (w *Wire) mend(what harm) error {
	w.setMu.Lock()
	defer w.setMu.Unlock()
	mended, err := w.chain.mend(what)
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
// this interface, or changed its sets, and all is back, or the error that keeps them away; it is
// tried again then.
func (w *Wire) Tampered() <-chan error { return w.tampered }

func (h *chain) mend(what harm) (bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	old, err := findTable(h.c, h.ifname)
	if err != nil {
		return false, err
	}
	if old != nil && what != setsChanged && h.intact() {
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
