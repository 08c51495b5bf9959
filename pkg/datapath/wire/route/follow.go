package route

import (
	"errors"
	"time"

	nl "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Timing of what follows changes.
const (
	settle = 20 * time.Millisecond
	again  = time.Second
)

// groups whose events make us look again. Their contents do not matter, so a
// lost one costs nothing.
var groups = []uint32{
	unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
}

func listen() (*nl.Conn, error) {
	c, err := nl.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		if err := c.JoinGroup(g); err != nil {
			c.Close()
			return nil, err
		}
	}
	return c, nil
}

func (t *Table) listen() {
	defer t.done.Done()
	for {
		_, err := t.events.Receive()
		select {
		case <-t.stop:
			return
		default:
		}
		t.wake()
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			select {
			case <-t.stop:
				return
			case <-time.After(again):
			}
		}
	}
}

func (t *Table) wake() {
	select {
	case t.kick <- struct{}{}:
	default:
	}
}

// follow looks again after changes by others.
func (t *Table) follow() {
	defer t.done.Done()
	told := "" // the error
	for {
		select {
		case <-t.stop:
			return
		case <-t.kick:
		}
		select {
		case <-t.stop:
			return
		case <-time.After(settle):
		}
		t.mu.Lock()
		var err error
		if t.fresh && !t.closed {
			if err = t.addRules(); err == nil {
				err = t.reconcile()
			}
		}
		t.mu.Unlock()
		text := ""
		if err != nil {
			text = err.Error()
			time.AfterFunc(again, t.wake)
		}
		if text != told {
			t.tell(err)
		}
		told = text
	}
}

// tell replaces news that nobody took.
func (t *Table) tell(err error) {
	select {
	case <-t.errs:
	default:
	}
	t.errs <- err // the only sender, so there is room
}
