package lab

import (
	"fmt"
	"sort"
	"strings"
)

// Snapshot is what an operator would call the state of a host: what `missiu
// stop` must leave as it found it. Section by section, as text. Logs and the
// empty directory /run/missiu, which instances share, may stay and are left out.
type Snapshot map[string]string

var sections = map[string]string{
	"links":      `ip -d -o link | sed 's/ state [A-Z]* / /'`,
	"addresses":  `ip -o addr`,
	"routes":     `ip route show table all; ip -6 route show table all | sed 's/ expires [^ ]*//'`,
	"rules":      `ip rule; ip -6 rule`,
	"qdiscs":     `tc qdisc; tc filter`,
	"nftables":   `nft -a list ruleset`,
	"sysctls":    `cd /proc/sys/net && grep -rs . ipv4/conf ipv6/conf ipv4/ip_forward core | sort`,
	"run":        `find /run -mindepth 1 -printf '%p %y %m\n' | grep -v -e '\.log f ' -e '^/run/missiu d ' | sort`,
	"etc":        `find /etc/missiu -printf '%p %y %m %s\n' | sort`,
	"listeners":  `ss -Hlnx | awk '{print $5}' | sort; ss -Hlntu | awk '{print $1,$5}' | sort; ss -Hlnw0 | awk '{print $1,$5}' | sort`,
	"multicasts": `ip -o maddr`,
}

// Snapshot records the state of the host.
func (h *Host) Snapshot() Snapshot {
	h.t.Helper()
	s := Snapshot{}
	for name, line := range sections {
		r := h.Run("bash", "-c", line)
		s[name] = r.Out
	}
	return s
}

// Diff tells what is not as it was; "" if all is.
func (s Snapshot) Diff(now Snapshot) string {
	var names []string
	for n := range s {
		names = append(names, n)
	}
	sort.Strings(names)
	var b strings.Builder
	for _, n := range names {
		was, is := lines(s[n]), lines(now[n])
		for l := range was {
			if !is[l] {
				fmt.Fprintf(&b, "%s: gone: %s\n", n, l)
			}
		}
		for l := range is {
			if !was[l] {
				fmt.Fprintf(&b, "%s: new:  %s\n", n, l)
			}
		}
	}
	return b.String()
}

func lines(s string) map[string]bool {
	m := map[string]bool{}
	for _, l := range strings.Split(s, "\n") {
		if l = strings.TrimSpace(l); l != "" {
			m[l] = true
		}
	}
	return m
}
