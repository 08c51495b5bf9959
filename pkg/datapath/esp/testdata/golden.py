#!/usr/bin/python3
# Makes scapy-golden.json and plain-golden.json, here and in ../../ah/testdata, the
# same ones each time. scapy makes the packets of the suites
# that it has; those of the others are put together here, octet by octet from the
# RFCs, with hashlib, hmac and OpenSSL (by the Python library cryptography). Needs
# Debian's python3-scapy.
import hashlib, hmac, json, logging, os, struct
logging.disable(logging.CRITICAL)
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM
from scapy.layers.inet import IP, ICMP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.ipsec import AH, ESP, SecurityAssociation
from scapy.packet import Raw

here = os.path.dirname(os.path.abspath(__file__))


def octets(name, n):
    out, i = b"", 0
    while len(out) < n:
        out += hashlib.sha256(f"{name} {i}".encode()).digest()
        i += 1
    return out[:n]


def num(name):
    return struct.unpack(">I", octets(name + " number", 4))[0] | 0x1000


def inner(name, v6, transport):
    load = Raw(octets(name + " load", num(name + " length") % 90))
    if v6:
        src, dst = ("fd00::1", "fd00::2") if transport else ("fd01::7", "fd02::9")
        p = IPv6(src=src, dst=dst, fl=num(name) & 0xfffff, hlim=64) / UDP(sport=4000, dport=53) / load
    else:
        src, dst = ("192.0.2.1", "192.0.2.2") if transport else ("10.1.0.7", "10.2.0.9")
        p = IP(src=src, dst=dst, id=num(name) & 0xffff, tos=0x28, flags="DF", ttl=63) / ICMP(id=1, seq=2) / load
    return bytes(p)


def record(name, **kw):
    base = dict(name=name, esn_high=None, udp_encap=False, refuse=False)
    base.update({k: (v.hex() if isinstance(v, bytes) else v) for k, v in kw.items()})
    return base


def scapy_packet(proto, name, mode, v6, enc, ealg, ekey, auth, aalg, akey):
    spi, seq = num(name + " spi"), num(name + " seq")
    i = inner(name, v6, mode == "transport")
    kw = dict(spi=spi, seq_num=seq, auth_algo=aalg, auth_key=akey)
    if proto is ESP:
        kw.update(crypt_algo=ealg, crypt_key=ekey)
    if mode == "tunnel":
        kw["tunnel_header"] = IP(src="192.0.2.1", dst="192.0.2.2", ttl=64)
    sa = SecurityAssociation(proto, **kw)
    if proto is ESP:
        outer = sa.encrypt((IPv6 if v6 else IP)(i), seq_num=seq, iv=octets(name + " iv", {"NULL": 0}.get(ealg, 8)))
    else:
        outer = sa.encrypt((IPv6 if v6 else IP)(i), seq_num=seq)
    return record(name, proto=50 if proto is ESP else 51, mode=mode, spi=spi, seq=seq, enc=enc, enc_key=ekey, auth=auth,
                  auth_key=akey, inner=i, outer=bytes(outer))


scapy_esp, scapy_ah = [], []
for enc, ealg, klen in [("des-cbc", "DES", 8), ("3des-cbc", "3DES", 24), ("null", "NULL", 0), ("aes128-ctr", "AES-CTR", 20), ("aes256-ctr", "AES-CTR", 36)]:
    for auth, aalg, alen in [("hmac-md5-96", "HMAC-MD5-96", 16), ("hmac-sha1-96", "HMAC-SHA1-96", 20), ("aes-cmac-96", "AES-CMAC-96", 16)]:
        if auth != "hmac-md5-96" and enc not in ("des-cbc", "3des-cbc"):
            continue
        for mode in ("tunnel", "transport"):
            for v6 in (False, True):
                name = f"esp {enc}+{auth} {mode} {6 if v6 else 4}"
                scapy_esp.append(scapy_packet(ESP, name, mode, v6, enc, ealg, octets(name + " key", klen), auth, aalg, octets(name + " auth", alen)))
for mode in ("tunnel", "transport"):
    for v6 in (False, True):
        name = f"ah hmac-md5-96 {mode} {6 if v6 else 4}"
        scapy_ah.append(scapy_packet(AH, name, mode, v6, "", None, b"", "hmac-md5-96", "HMAC-MD5-96", octets(name + " auth", 16)))


def parts(i, mode):
    """The payload and its protocol."""
    if mode == "tunnel":
        return i, 41 if i[0] >> 4 == 6 else 4
    return (i[40:], i[6]) if i[0] >> 4 == 6 else (i[20:], i[9])


def outer_header(i, mode, proto, n):
    """The IP header in front of n octets of proto; scapy computes the checksum."""
    if mode == "transport" and i[0] >> 4 == 6:
        return i[:4] + struct.pack(">HB", n, proto) + i[7:40]
    if mode == "transport":
        h = IP(i[:20])
    else:
        h = IP(src="192.0.2.1", dst="192.0.2.2", ttl=64, id=num("outer") & 0xffff)
    h.remove_payload()
    h.len, h.proto, h.chksum = 20 + n, proto, None
    return bytes(h)


def padded(payload, next, align, fill):
    n = -(len(payload) + 2) % align
    return payload + (fill(n) if fill else bytes(range(1, n + 1))) + bytes([n, next])


def des(key, iv, data):
    key = {8: key * 3, 16: key + key[:8], 24: key}[len(key)]  # E(k)D(k)E(k) is E(k)
    e = Cipher(algorithms.TripleDES(key), modes.CBC(iv)).encryptor()
    return e.update(data) + e.finalize()


plain_esp, plain_ah = [], []


def esp(name, mode, v6, enc, key, build, esn_high=None, seq=True):
    spi, number = num(name + " spi"), num(name + " seq")
    i = inner(name, v6, mode == "transport")
    payload, next = parts(i, mode)
    b = build(name, struct.pack(">I", spi), struct.pack(">I", number), b"" if esn_high is None else struct.pack(">I", esn_high), payload, next, key)
    plain_esp.append(record(name, proto=50, mode=mode, spi=spi, seq=number if seq else 0, esn_high=esn_high, enc=enc, enc_key=key,
                            auth="", auth_key=b"", inner=i, outer=outer_header(i, mode, 50, len(b)) + b))


def ccm(tag):
    def build(name, spi, seq, high, payload, next, key):
        iv = octets(name + " iv", 8)
        c = AESCCM(key[:-3], tag_length=tag).encrypt(key[-3:] + iv, padded(payload, next, 4, None), spi + high + seq)
        return spi + seq + iv + c
    return build


def gmac(name, spi, seq, high, payload, next, key):
    iv = octets(name + " iv", 8)
    p = padded(payload, next, 4, None)
    return spi + seq + iv + p + AESGCM(key[:-4]).encrypt(key[-4:] + iv, b"", spi + high + seq + iv + p)


def old(ivlen):
    def build(name, spi, seq, high, payload, next, key):
        iv = octets(name + " iv", ivlen)
        whole = iv if ivlen == 8 else iv + bytes(255 ^ b for b in iv)
        return spi + iv + des(key, whole, padded(payload, next, 8, lambda n: octets(name + " padding", n)))
    return build


for mode in ("tunnel", "transport"):
    for v6 in (False, True):
        for bits in (128, 192, 256):
            for tag in (8, 12, 16):
                for high in (None, 5):
                    name = f"esp aes{bits}-ccm{tag} {mode} {6 if v6 else 4}" + (" esn" if high else "")
                    esp(name, mode, v6, f"aes{bits}-ccm{tag}", octets(name + " key", bits // 8 + 3), ccm(tag), high)
            for high in (None, 5):
                name = f"esp null-aes{bits}-gmac {mode} {6 if v6 else 4}" + (" esn" if high else "")
                esp(name, mode, v6, f"null-aes{bits}-gmac", octets(name + " key", bits // 8 + 4), gmac, high)
        for enc, klen in (("des", 8), ("3des", 16), ("3des", 24)):
            for ivlen in (4, 8):
                name = f"esp {enc}-iv{ivlen * 8} key of {klen} {mode} {6 if v6 else 4}"
                esp(name, mode, v6, f"{enc}-iv{ivlen * 8}", octets(name + " key", klen), old(ivlen), seq=False)


def ah(name, mode, v6, auth, key, esn_high, sum, fixed, icvlen):
    spi, number = num(name + " spi"), num(name + " seq")
    i = inner(name, v6, mode == "transport")
    payload, next = parts(i, mode)
    over6 = v6 and mode == "transport"
    align = 8 if over6 else 4
    n = (fixed + icvlen + align - 1) // align * align
    h = struct.pack(">BBHI", next, n // 4 - 2, 0, spi) + (struct.pack(">I", number) if fixed == 12 else b"")
    ip = outer_header(i, mode, 51, n + len(payload))
    m = bytearray(ip)
    if over6:
        m[7] = 0
        if fixed == 12:
            m[0:4] = b"\x60\0\0\0"
    else:
        m[8] = m[10] = m[11] = 0
        if fixed == 12:
            m[1] = m[6] = m[7] = 0
    covered = bytes(m) + h + bytes(n - fixed) + payload + (b"" if esn_high is None else struct.pack(">I", esn_high))
    icv = sum(key, covered, struct.pack(">II", esn_high or 0, number))
    assert len(icv) == icvlen
    plain_ah.append(record(name, mode=mode, spi=spi, esn_high=esn_high, auth=auth, auth_key=key, inner=i,
                           outer=ip + h + icv + bytes(n - fixed - icvlen) + payload))


def keyed_md5(key, data, iv):
    fill = b"\x80" + bytes(55 - len(key)) + struct.pack("<Q", 8 * len(key))
    return hashlib.md5(key + fill + data + key).digest()


def ah_gmac(key, data, iv):
    return iv + AESGCM(key[:-4]).encrypt(key[-4:] + iv, b"", data)


for mode in ("tunnel", "transport"):
    for v6 in (False, True):
        name = f"ah keyed-md5 {mode} {6 if v6 else 4}"
        ah(name, mode, v6, "keyed-md5", octets(name + " key", 16), None, keyed_md5, 8, 16)
        for bits in (128, 192, 256):
            for high in (None, 5):
                name = f"ah aes{bits}-gmac {mode} {6 if v6 else 4}" + (" esn" if high else "")
                ah(name, mode, v6, f"aes{bits}-gmac", octets(name + " key", bits // 8 + 4), high, ah_gmac, 12, 24)


def write(path, source, tests):
    with open(os.path.join(here, path), "w") as f:
        f.write('{"source": %s,\n"tests": [\n' % json.dumps(source))
        f.write(",\n".join(json.dumps(t) for t in tests) + "\n]}\n")


write("scapy-golden.json", "scapy, by golden.py", scapy_esp)
write("plain-golden.json", "golden.py, from the RFCs with OpenSSL", plain_esp)
write("../../ah/testdata/scapy-golden.json", "scapy, by golden.py of esp/testdata", scapy_ah)
write("../../ah/testdata/plain-golden.json", "golden.py of esp/testdata, from the RFCs with OpenSSL and hashlib", plain_ah)
