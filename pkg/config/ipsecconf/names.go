package ipsecconf

import (
	"strconv"
	"strings"

	"github.com/missiu/missiu/pkg/config/lexer"
	"github.com/missiu/missiu/pkg/crypto/alg"
)

// protocols that a ulp can name; numbers do as well.
var protocols = map[string]uint8{
	"icmp": 1, "igmp": 2, "ipip": 4, "ipencap": 4, "tcp": 6, "egp": 8, "udp": 17, "dccp": 33, "ipv6": 41, "rsvp": 46,
	"gre": 47, "esp": 50, "ah": 51, "icmp6": 58, "ipv6-icmp": 58, "icmpv6": 58, "eigrp": 88, "ospf": 89, "pim": 103,
	"ipcomp": 108, "vrrp": 112, "l2tp": 115, "sctp": 132, "udplite": 136,
}

const (
	protoICMP   = 1
	protoICMPv6 = 58
)

func isICMP(proto uint8) bool { return proto == protoICMP || proto == protoICMPv6 }

// hasPorts reports whether a protocol has ports, 0 (any) included.
func hasPorts(proto uint8) bool {
	switch proto {
	case 0, 6, 17, 33, 132, 136:
		return true
	}
	return false
}

// services that are known whatever the host's own list says.
var services = map[string]uint16{
	"ftp-data": 20, "ftp": 21, "ssh": 22, "telnet": 23, "smtp": 25, "domain": 53, "dns": 53, "tftp": 69, "http": 80,
	"pop3": 110, "sunrpc": 111, "ntp": 123, "imap": 143, "snmp": 161, "bgp": 179, "ldap": 389, "https": 443,
	"isakmp": 500, "syslog": 514, "ldaps": 636, "nfs": 2049, "ipsec-nat-t": 4500,
}

// Keywords of ICMP types and codes, with their protocol.
var icmpTypes = map[uint8]map[string]uint8{
	protoICMP: {
		"echorep": 0, "unreach": 3, "squench": 4, "redir": 5, "echo": 8, "timex": 11, "paramprob": 12, "timest": 13,
		"timestrep": 14, "inforeq": 15, "inforep": 16, "maskreq": 17, "maskrep": 18,
	},
	protoICMPv6: {
		"unreach6": 1, "pkttoobig6": 2, "timex6": 3, "paramprob6": 4, "echo6": 128, "echorep6": 129, "router-sol6": 133,
		"router-ad6": 134, "neigh-sol6": 135, "neigh-ad6": 136, "redir6": 137,
	},
}

var icmpCodes = map[uint8]map[string]uint8{
	protoICMP: {
		"net-unr": 0, "host-unr": 1, "proto-unr": 2, "port-unr": 3, "needfrag": 4, "srcfail": 5, "net-unk": 6,
		"host-unk": 7, "isolate": 8, "net-prohib": 9, "host-prohib": 10, "net-tos": 11, "host-tos": 12,
		"filter-prohib": 13, "host-preced": 14, "cutoff-preced": 15,
	},
	protoICMPv6: {
		"no-route6": 0, "adm-prohib6": 1, "addr-unr6": 3, "port-unr6": 4, "hop-limex6": 0, "frag-re-timex6": 1,
		"err-head6": 0, "unrec-head6": 1, "unreq-opt6": 2,
	},
}

// Algorithms by name, without regard to case, or by PF_KEY number.
var encrs = map[string]alg.Encr{
	"aes": alg.EncrAESCBC, "aes-cbc": alg.EncrAESCBC, "12": alg.EncrAESCBC,
	"gcm": alg.EncrAESGCM16, "aes-gcm": alg.EncrAESGCM16, "aes-gcm-16": alg.EncrAESGCM16, "aes-gcm16": alg.EncrAESGCM16, "20": alg.EncrAESGCM16,
	"aes-gcm-12": alg.EncrAESGCM12, "aes-gcm12": alg.EncrAESGCM12, "19": alg.EncrAESGCM12,
	"aes-gcm-8": alg.EncrAESGCM8, "aes-gcm8": alg.EncrAESGCM8, "18": alg.EncrAESGCM8,
	"chacha20-poly1305": alg.EncrChaCha20Poly1305, "chacha20poly1305": alg.EncrChaCha20Poly1305, "28": alg.EncrChaCha20Poly1305,
	"ctr": alg.EncrAESCTR, "aes-ctr": alg.EncrAESCTR, "13": alg.EncrAESCTR,
	"ccm": alg.EncrAESCCM16, "aes-ccm": alg.EncrAESCCM16, "aes-ccm-16": alg.EncrAESCCM16, "aes-ccm16": alg.EncrAESCCM16, "16": alg.EncrAESCCM16,
	"aes-ccm-12": alg.EncrAESCCM12, "aes-ccm12": alg.EncrAESCCM12, "15": alg.EncrAESCCM12,
	"aes-ccm-8": alg.EncrAESCCM8, "aes-ccm8": alg.EncrAESCCM8, "14": alg.EncrAESCCM8,
	"gcm-iiv": alg.EncrAESGCM16IIV, "aes-gcm-iiv": alg.EncrAESGCM16IIV, "aes-gcm-16-iiv": alg.EncrAESGCM16IIV, "30": alg.EncrAESGCM16IIV,
	"aes-ccm-8-iiv": alg.EncrAESCCM8IIV, "29": alg.EncrAESCCM8IIV,
	"chacha20-poly1305-iiv": alg.EncrChaCha20Poly1305IIV, "31": alg.EncrChaCha20Poly1305IIV,
	"gmac": alg.EncrNULLAESGMAC, "aes-gmac": alg.EncrNULLAESGMAC, "null-aes-gmac": alg.EncrNULLAESGMAC, "23": alg.EncrNULLAESGMAC,
	"null": alg.EncrNULL, "11": alg.EncrNULL,
	"des": alg.EncrDESCBC, "des-cbc": alg.EncrDESCBC, "2": alg.EncrDESCBC,
	"3des": alg.Encr3DESCBC, "3des-cbc": alg.Encr3DESCBC, "3": alg.Encr3DESCBC,
	"des-iv64": alg.EncrDESIV64, "1": alg.EncrDESIV64, "des-iv32": alg.EncrDESIV32, "9": alg.EncrDESIV32,
	"3des-iv64": alg.Encr3DESIV64, "240": alg.Encr3DESIV64, "3des-iv32": alg.Encr3DESIV32, "241": alg.Encr3DESIV32,
}

var auths = map[string]alg.Integ{
	"sha1": alg.IntegHMACSHA1, "sha": alg.IntegHMACSHA1, "sha-1": alg.IntegHMACSHA1, "3": alg.IntegHMACSHA1,
	"sha256": alg.IntegHMACSHA256, "sha-256": alg.IntegHMACSHA256, "5": alg.IntegHMACSHA256,
	"sha384": alg.IntegHMACSHA384, "sha-384": alg.IntegHMACSHA384, "6": alg.IntegHMACSHA384,
	"sha512": alg.IntegHMACSHA512, "sha-512": alg.IntegHMACSHA512, "7": alg.IntegHMACSHA512,
	"xcbc": alg.IntegAESXCBC, "aes-xcbc": alg.IntegAESXCBC, "aes-xcbc-mac": alg.IntegAESXCBC, "9": alg.IntegAESXCBC,
	"aes":  alg.IntegAESXCBC, // NanoSec's
	"cmac": alg.IntegAESCMAC, "aes-cmac": alg.IntegAESCMAC, "248": alg.IntegAESCMAC,
	"aes-gmac-128": alg.IntegAESGMAC128, "11": alg.IntegAESGMAC128,
	"aes-gmac-192": alg.IntegAESGMAC192, "12": alg.IntegAESGMAC192,
	"aes-gmac-256": alg.IntegAESGMAC256, "13": alg.IntegAESGMAC256,
	"md5": alg.IntegHMACMD5, "2": alg.IntegHMACMD5,
	"keyed-md5": alg.IntegKeyedMD5, "249": alg.IntegKeyedMD5,
}

// What other systems know and we do not have.
var (
	foreignEncrs = map[string]bool{
		"blowfish": true, "blowfish-cbc": true, "7": true, "cast": true, "cast-cbc": true, "cast128-cbc": true, "6": true,
		"camellia": true, "camellia-cbc": true, "22": true, "idea": true, "rc5": true,
	}
	foreignAuths = map[string]bool{
		"blake2b": true, "blake2s": true, "ripemd": true, "ripemd160": true, "8": true,
	}
)

const (
	wantEncr = "want aes, gcm, chacha20-poly1305, ccm, ctr, gmac, null or any, perhaps with key bits as in aes(128..256)"
	wantAuth = "want sha1, sha256, sha384, sha512, aes-xcbc, aes-cmac or any"
	wantAH   = "want sha1, sha256, sha384, sha512, aes-xcbc, aes-cmac, aes-gmac-128, aes-gmac-192, aes-gmac-256 or any"
)

// algWord is an algorithm word, a name with a range of key lengths behind it.
type algWord struct {
	name     string // lower case
	min, max uint16 // 0: open
	ranged   bool
}

// splitAlg reads name, name(n), name(n..), name(..n), name(n..n).
func splitAlg(s string) (a algWord, ok bool) {
	name, rest, ranged := strings.Cut(s, "(")
	a = algWord{name: strings.ToLower(name), ranged: ranged}
	if !ranged {
		return a, true
	}
	rest, closed := strings.CutSuffix(rest, ")")
	lo, hi, interval := strings.Cut(rest, "..")
	if !closed || interval && lo == "" && hi == "" {
		return a, false
	}
	for _, e := range []struct {
		s string
		n *uint16
	}{{lo, &a.min}, {hi, &a.max}} {
		if e.s == "" && interval {
			continue
		}
		if !interval && e.n == &a.max {
			a.max = a.min
			continue
		}
		n, ok := number(e.s, 65535)
		if !ok || n == 0 {
			return a, false
		}
		*e.n = uint16(n)
	}
	return a, true
}

// holds reports whether bits lie in the range.
func (a algWord) holds(bits int) bool {
	return bits >= int(a.min) && (a.max == 0 || bits <= int(a.max))
}

// fits reports whether one of the key lengths lies in the range.
func (a algWord) fits(bits []int) bool {
	for _, b := range bits {
		if a.holds(b) {
			return true
		}
	}
	return false
}

func (a algWord) write(name string) string {
	switch {
	case a.min == 0 && a.max == 0:
		return name
	case a.min == a.max:
		return name + "(" + strconv.Itoa(int(a.min)) + ")"
	}
	s := name + "("
	if a.min > 0 {
		s += strconv.Itoa(int(a.min))
	}
	s += ".."
	if a.max > 0 {
		s += strconv.Itoa(int(a.max))
	}
	return s + ")"
}

func bitList(bits []int) string {
	var l []string
	for _, b := range bits {
		l = append(l, strconv.Itoa(b))
	}
	return lexer.Or(l...)
}
