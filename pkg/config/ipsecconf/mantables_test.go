package ipsecconf

import (
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
)

// section gives the words and the dialects of the tables of a section of
// ipsecconf(5).
func section(t *testing.T, name string) map[string]string {
	t.Helper()
	b, err := os.ReadFile("../../../cmd/loadconfig/ipsecconf.5")
	if err != nil {
		t.Fatal(err)
	}
	_, s, ok := strings.Cut(string(b), "\n.SS "+name+"\n")
	if !ok {
		t.Fatalf("no section %s", name)
	}
	s, _, _ = strings.Cut(s, "\n.S")
	rows := map[string]string{}
	for _, line := range strings.Split(s, "\n") {
		f := strings.Split(line, "\t")
		if len(f) != 3 || f[0] == "keyword" {
			continue
		}
		if f[2] == "" {
			t.Errorf("%s: %q says nothing", name, line)
		}
		for _, k := range strings.Split(f[0], ",") {
			k, _, _ = strings.Cut(strings.Trim(k, " ;."), " ")
			rows[strings.TrimSuffix(k, ";")] = f[1]
		}
	}
	return rows
}

// TestManTables: the tables have the words that the parser knows, all of them
// and no other.
func TestManTables(t *testing.T) {
	keys := func(ms ...map[string]uint8) (l []string) {
		for _, m := range ms {
			l = slices.AppendSeq(l, maps.Keys(m))
		}
		return l
	}
	for name, want := range map[string][]string{
		"Selectors":                          selectorKeys,
		"Actions":                            append(slices.Clone(actions), "or"),
		"Properties":                         propertyKeys,
		"Commands":                           commands,
		"Directions":                         slices.Collect(maps.Keys(dirNames)),
		"What a tunnel interface negotiates": {"tunnel", "transport"},
		"Protocols":                          keys(protocols),
		"Services":                           slices.Collect(maps.Keys(services)),
		"Types and codes of ICMP":            keys(icmpTypes[protoICMP], icmpTypes[protoICMPv6], icmpCodes[protoICMP], icmpCodes[protoICMPv6]),
	} {
		rows := section(t, name)
		for _, k := range want {
			if d := rows[k]; d != "S" && d != "N" && d != "S N" {
				t.Errorf("%s: %s is of dialect %q, want S, N or S N", name, k, d)
			}
			delete(rows, k)
		}
		if len(rows) > 0 {
			t.Errorf("%s has words that the parser does not know: %v", name, rows)
		}
	}
	for k, d := range section(t, "Directions") {
		if slices.Contains(nanosecDirs, k) != (d == "N") {
			t.Errorf("direction %s is of dialect %s", k, d)
		}
	}
	for k, d := range section(t, "Protocols") {
		if nanosecProtocols[k] != (d == "S N") {
			t.Errorf("protocol %s is of dialect %s", k, d)
		}
	}
}
