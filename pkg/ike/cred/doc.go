// Package cred is proof of identity by X.509 certificates and digital
// signatures: what we prove ourselves with (Own), whom we believe (Trust), and the
// signatures of AUTH payloads in all forms (RFC 7296, 3.8; RFC 4754; RFC 7427;
// RFC 8420). Profile of the certificates: RFC 4945. It reads no files: PEM and DER
// come as octets.
//
// Everything here computes in the caller's goroutine, which in ike is the one of
// the IKE SA in question: a signature takes a millisecond with RSA of 2048
// bits, some with 4096, less with the others. Own and Trust are not changed once
// made and are safe for concurrent use.
//
// For pkg/ike/pad, which holds them in its rules, pkg/ike/sa, which asks them, and
// pkg/config/ikeconf, which makes them. The only package that reads encrypted
// private keys (youmark/pkcs8).
package cred
