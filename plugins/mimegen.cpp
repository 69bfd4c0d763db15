/*
 *  mimegen - generate the mail of a message without a body from its JSON properties.
 *
 *      c++ -shared -fPIC -O2 -fvisibility=hidden -I../include -o mimegen.so mimegen.cpp -ljson-c
 *
 *  An application publishes
 *
 *      {"envelope": "news@shop.test", "recipient": "ann@example.test",
 *       "generate": {"from": "Shop <news@shop.test>", "subject": "Hello {name}",
 *                    "text": "Dear {name}, ...", "html": "<p>Dear {name}, ...</p>"},
 *       "values": {"name": "Ann"}}
 *
 *  and the plugin makes the body when the peer waits for it, so the queue never holds it.
 *  "from" and one of "text" and "html" are required; "to" defaults to the recipient. {name}
 *  is replaced by a property of "values", in "html" with its <, >, & and " escaped. Names that
 *  are not in "values" are kept as written. Messages with a body, or without the property to
 *  generate one from, are left unchanged.
 *
 *      MIMEGEN_PROPERTY=generate       the name of the property
 *
 *  The pattern: a plugin in C++. mailerq.h gives the functions the right linkage. Exceptions
 *  must not leave the functions: mailerq would catch them and fail the event. This plugin
 *  turns an exception into a reject that names the mistake in the message.
 */
#include <mailerq.h>

#include <json-c/json.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <stdexcept>
#include <string>
#include <string_view>

namespace {

constexpr std::size_t base64_line = 76;     // characters (RFC 2045, 6.8)
constexpr std::size_t word_bytes = 39;      // in one encoded word, of at most 75 (RFC 2047, 2)

const char *property = "generate";

/** A string property; empty if it is absent. Throws std::invalid_argument for other types. */
std::string text_of(json_object *object, const char *name)
{
    json_object *value = nullptr;
    if (!json_object_object_get_ex(object, name, &value) || !value) return {};
    if (!json_object_is_type(value, json_type_string))
    {
        throw std::invalid_argument(std::string(name) + " is no string");
    }
    return {json_object_get_string(value),
            static_cast<std::size_t>(json_object_get_string_len(value))};
}

std::string base64(std::string_view bytes, std::size_t line)
{
    static const char digits[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string result;
    std::size_t column = 0;
    for (std::size_t i = 0; i < bytes.size(); i += 3)
    {
        unsigned long group = 0;
        for (std::size_t j = 0; j < 3; j++)
        {
            bool present = i + j < bytes.size();
            group = group << 8 | (present ? static_cast<unsigned char>(bytes[i + j]) : 0u);
        }
        for (std::size_t j = 0; j < 4; j++)
        {
            bool padding = i + j > bytes.size();
            result += padding ? '=' : digits[group >> (18 - 6 * j) & 63];
        }
        column += 4;
        if (line && column == line)
        {
            result += "\r\n";
            column = 0;
        }
    }
    return result;
}

bool is_ascii(std::string_view text)
{
    for (unsigned char byte : text) if (byte > 126) return false;
    return true;
}

/**
 *  The value of a header field. Control characters become blanks, because a line end would
 *  start another field. Text that is not ASCII becomes encoded words.
 */
std::string header_value(std::string text)
{
    for (char &byte : text) if (static_cast<unsigned char>(byte) < 32 || byte == 127) byte = ' ';
    if (is_ascii(text)) return text;
    std::string result;
    for (std::size_t start = 0; start < text.size();)
    {
        std::size_t end = std::min(start + word_bytes, text.size());
        // Do not split a character between two words.
        while (end < text.size() && end > start + 1 && (text[end] & 0xC0) == 0x80) end--;
        if (start) result += "\r\n ";
        result += "=?utf-8?B?" + base64(text.substr(start, end - start), 0) + "?=";
        start = end;
    }
    return result;
}

/** The value of an address field: in "Name <address>" only the name may be encoded. */
std::string address_value(const std::string &text)
{
    std::size_t open = text.rfind('<');
    if (open == std::string::npos || open == 0) return header_value(text);
    std::size_t name = text.find_last_not_of(' ', open - 1);
    if (name == std::string::npos) return header_value(text.substr(open));
    return header_value(text.substr(0, name + 1)) + " " + header_value(text.substr(open));
}

std::string escape(std::string_view text)
{
    std::string result;
    for (char byte : text)
    {
        if (byte == '<') result += "&lt;";
        else if (byte == '>') result += "&gt;";
        else if (byte == '&') result += "&amp;";
        else if (byte == '"') result += "&quot;";
        else result += byte;
    }
    return result;
}

/** Replace {names} with values. */
std::string fill(const std::string &text, json_object *values, bool html)
{
    std::string result;
    std::size_t position = 0;
    for (std::size_t open; (open = text.find('{', position)) != std::string::npos;)
    {
        result.append(text, position, open - position);
        std::size_t close = text.find('}', open);
        if (close == std::string::npos)
        {
            position = open;
            break;
        }
        std::string name = text.substr(open + 1, close - open - 1);
        json_object *value = nullptr;
        if (values && json_object_object_get_ex(values, name.c_str(), &value))
        {
            const char *given = value ? json_object_get_string(value) : "";
            result += html ? escape(given) : given;
            position = close + 1;
        }
        else
        {
            result += '{';
            position = open + 1;
        }
    }
    return result.append(text, position);
}

std::string date()
{
    // strftime would use day and month names of the locale.
    static const char days[] = "SunMonTueWedThuFriSat";
    static const char months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
    std::time_t now = std::time(nullptr);
    std::tm utc{};
    gmtime_r(&now, &utc);
    char text[64];
    std::snprintf(text, sizeof text, "%.3s, %d %.3s %d %02d:%02d:%02d +0000",
                  days + 3 * utc.tm_wday, utc.tm_mday, months + 3 * utc.tm_mon,
                  utc.tm_year + 1900, utc.tm_hour, utc.tm_min, utc.tm_sec);
    return text;
}

std::string part(const char *type, std::string_view text)
{
    std::string lines;          // with CRLF, the canonical form of text in base64
    for (char byte : text)
    {
        if (byte == '\n') lines += '\r';
        if (byte != '\r') lines += byte;
    }
    return std::string("Content-Type: ") + type + "; charset=utf-8\r\n"
           "Content-Transfer-Encoding: base64\r\n\r\n" + base64(lines, base64_line) + "\r\n";
}

/** Generate the whole mail. Throws std::invalid_argument if the JSON is not sufficient. */
std::string generate(json_object *json, json_object *source, const char *recipient)
{
    json_object *values = nullptr;
    json_object_object_get_ex(json, "values", &values);
    if (!json_object_is_type(source, json_type_object)) throw std::invalid_argument("no object");
    if (values && !json_object_is_type(values, json_type_object)) values = nullptr;

    std::string from = text_of(source, "from");
    std::string to = text_of(source, "to");
    std::string text = fill(text_of(source, "text"), values, false);
    std::string html = fill(text_of(source, "html"), values, true);
    if (from.empty()) throw std::invalid_argument("from is missing");
    if (text.empty() && html.empty()) throw std::invalid_argument("text and html are missing");

    std::string mail = "Date: " + date() + "\r\n";
    mail += "From: " + address_value(from) + "\r\n";
    mail += "To: " + address_value(to.empty() ? recipient : to) + "\r\n";
    mail += "Subject: " + header_value(fill(text_of(source, "subject"), values, false)) + "\r\n";
    std::string id = text_of(json, "message-id");
    std::size_t at = from.rfind('@');
    if (!id.empty() && at != std::string::npos)
    {
        std::string domain = from.substr(at + 1, from.find_first_of("> \r\n", at) - at - 1);
        mail += "Message-ID: <" + id + "@" + domain + ">\r\n";
    }
    mail += "MIME-Version: 1.0\r\n";
    if (html.empty()) return mail + part("text/plain", text);
    if (text.empty()) return mail + part("text/html", html);
    // Both parts are base64, which cannot contain the "=_" of the boundary.
    const std::string boundary = "=_mimegen";
    mail += "Content-Type: multipart/alternative; boundary=\"" + boundary + "\"\r\n\r\n";
    mail += "--" + boundary + "\r\n" + part("text/plain", text);
    mail += "--" + boundary + "\r\n" + part("text/html", html);
    return mail + "--" + boundary + "--\r\n";
}

}  // namespace

MQ_EXPORT int mq_version()
{
    return MQ_API_VERSION;
}

MQ_EXPORT void mq_initialize()
{
    const char *setting = std::getenv("MIMEGEN_PROPERTY");
    if (setting && *setting) property = setting;
}

MQ_EXPORT bool mq_smtp_out_data(MQ_Context *, MQ_SmtpConnection *connection, MQ_Message *message)
{
    // MQ_Mime is cheap, MQ_Json builds an object, and most mail has a body.
    if (MQ_Mime(message)) return false;
    json_object *json = MQ_Json(message);
    json_object *source = nullptr;
    if (!json || !json_object_object_get_ex(json, property, &source) || !source) return false;
    try
    {
        const char *recipient = MQ_Recipient(message);
        std::string mail = generate(json, source, recipient ? recipient : "");
        MQ_SetMime(message, mail.data(), mail.size());
    }
    catch (const std::invalid_argument &error)
    {
        // A later attempt would fail too, so this is final.
        std::string reply = std::string("5.6.0 Property ") + property + ": " + error.what();
        MQ_Reject(connection, 554, reply.c_str());
    }
    catch (const std::exception &error)
    {
        MQ_Log(MQ_WARN, error.what());
        MQ_Reject(connection, 451, "4.3.0 The mail could not be generated");
    }
    return false;
}
