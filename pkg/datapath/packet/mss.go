package packet

import (
	"encoding/binary"
	"math/bits"
)

// Options of TCP (RFC 9293, 3.1; RFC 5925, 2.2).
const (
	tcpOptEnd = 0
	tcpOptNop = 1
	tcpOptMSS = 2
	tcpOptAO  = 29
)

// IsSYN reports whether the packet b, decoded in i, opens a TCP connection or
// answers that: the segments that may carry a maximum segment size. Fragments
// are not looked into.
func IsSYN(b []byte, i *Info) bool {
	return i.Proto == protoTCP && !i.IsFragment() && i.HdrLen+tcpLen <= i.Len && b[i.HdrLen+tcpFlagsOff]&tcpSYN != 0
}

// ClampMSS lowers the maximum segment size that the SYN b, decoded in i, tells
// to what packets of mtu octets carry without options (RFC 9293, 3.7.1), and
// corrects the TCP checksum by the difference (RFC 1624). It reports whether it
// has. Never is it raised, nor added where it is absent, nor changed where
// TCP-AO covers it (RFC 5925, 5.1: the receiver would refuse the segment).
func ClampMSS(b []byte, i *Info, mtu int) bool {
	if !IsSYN(b, i) {
		return false
	}
	mss := mtu - IPv4Len - tcpLen
	if i.Version == 6 {
		mss = mtu - IPv6Len - tcpLen
	}
	t := b[i.HdrLen:i.Len]
	end := int(t[tcpLenOff]>>4) * 4
	if mss <= 0 || end > len(t) {
		return false
	}
	at := 0 // of the value
	for k := tcpLen; k < end && t[k] != tcpOptEnd; {
		if t[k] == tcpOptNop {
			k++
			continue
		}
		if k+2 > end || t[k+1] < 2 || k+int(t[k+1]) > end || t[k] == tcpOptAO {
			return false
		}
		if t[k] == tcpOptMSS && t[k+1] == 4 && at == 0 {
			at = k + 2
		}
		k += int(t[k+1])
	}
	if at == 0 {
		return false
	}
	old := binary.BigEndian.Uint16(t[at:])
	if int(old) <= mss {
		return false
	}
	now := uint16(mss)
	binary.BigEndian.PutUint16(t[at:], now)
	if at%2 != 0 { // the sum sees its octets in two words
		old, now = bits.ReverseBytes16(old), bits.ReverseBytes16(now)
	}
	binary.BigEndian.PutUint16(t[tcpCsum:], UpdateChecksum(binary.BigEndian.Uint16(t[tcpCsum:]), old, now))
	return true
}
